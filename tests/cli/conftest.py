"""Commands run in this process, and pictures to run them on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carrara.cli import main

Command = Callable[..., "Result"]


@dataclass
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def carrara(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command through the program's own entry point, in this process: importing torch takes seconds."""

    def run(*words: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["carrara", *map(str, words)])
        monkeypatch.setattr("carrara.cli.console.console.width", 200)
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(carrara: Command) -> Callable[..., str]:
    """The one sentence with which a command refuses."""

    def run(*words: str | Path) -> str:
        result = carrara(*words)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("carrara: ")]
        assert len(lines) == 1, result.stderr
        return lines[0]

    return run


def photographs(folder: Path, count: int, classes: int = 1) -> Path:
    """A folder of random pictures, in class folders where there are several."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"class{i % classes}" if classes > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 17, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return folder
