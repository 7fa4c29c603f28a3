"""`carrara import` and `carrara export`: what they write, report and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.cli.conftest import Command
from tests.convert.test_guided_diffusion import original, told


def test_the_commands(
    carrara: Command,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    path, spec, answers = original("a1_unet_classcond_learnsigma", tmp_path)
    sets = [word for key, value in told(spec).items() for word in ("--set", f"{key}={value}")]
    result = carrara("import", path, *sets, "--check", answers, "--out", tmp_path / "m", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["check"]["equal"]
    assert carrara("sample", tmp_path / "m", "--steps", "2", "--count", "2", "--out", tmp_path / "s").returncode == 0
    result = carrara("export", tmp_path / "m", "--out", tmp_path / "back.pt")
    assert result.returncode == 0, result.stderr
    assert "num head channels" in result.stdout or "num_head_channels" in result.stdout
    first, again = torch.load(path), torch.load(tmp_path / "back.pt")
    assert all(torch.equal(value, again[key]) for key, value in first.items())

    assert "name them" in refused("import", path, "--set", "image_size=16", "--out", tmp_path / "n")
    assert "fits no published model" in refused("import", path, "--out", tmp_path / "n")
    assert "is there already" in refused("import", path, *sets, "--out", tmp_path / "m")
    assert "there is no checkpoint" in refused("import", tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:5000])
    assert "cut short" in refused("import", tmp_path / "cut.pt")
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    assert "pickled code" in refused("import", tmp_path / "code.pt")
    assert ".pth nor .safetensors" in refused("export", tmp_path / "m", "--out", tmp_path / "back.bin")
    np.savez(tmp_path / "half.npz", x=np.zeros((1, 3, 16, 16)))
    assert "lacks the array 't'" in refused("import", path, *sets, "--check", tmp_path / "half.npz", "--out", "n")
