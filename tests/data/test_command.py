"""`carrara data check`: words, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from carrara.app.request import parse_resolution
from carrara.cli.data import app
from carrara.errors import UserError
from tests.data.builders import files, folder

RUNNER = CliRunner()


def test_a_readable_report(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["check", str(folder(tmp_path, files(9))), "--batch-size", "4"])
    assert result.exit_code == 0
    for word in ("9 images", "suggested", "8×8", "epochs", "training can start"):
        assert word in result.stdout


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["check", str(folder(tmp_path, files(9))), "--json", "--train_batch_size", "4"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["images"] == 9


def test_exit_code_2_when_training_would_fail(tmp_path: Path) -> None:
    path = str(folder(tmp_path, files(9)))
    result = RUNNER.invoke(app, ["check", path])
    assert result.exit_code == 2
    assert "fewer than one batch of 64" in " ".join(result.stdout.split())
    assert RUNNER.invoke(app, ["check", path, "--json"]).exit_code == 2


def test_options_reach_the_check(tmp_path: Path) -> None:
    target = tmp_path / "p.png"
    words = ["check", "digits", "--split", "test", "--resolution", "16x24", "--channels", "3", "--sample", "20"]
    words += ["--steps", "36", "--batch-size", "10", "--images-per-second", "100", "--preview", str(target), "--json"]
    report = json.loads(RUNNER.invoke(app, words).stdout)
    assert "RGB" in report["prepared"]
    assert "16×24" in report["prepared"]
    assert (report["images"], report["looked_at"]) == (360, 20)
    assert report["plan"] == {"batch_size": 10, "steps": 36, "epochs": 1.0, "hours": 0.001}
    assert target.exists()


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("64x96", (64, 96)), ("64X96", (64, 96)), ("8×9", (8, 9))]
)
def test_resolutions(text: str, size: tuple[int, int]) -> None:
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "64x", "-3", "4x4x4", "large"])
def test_other_resolutions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--resolution is N or HxW"):
        parse_resolution(text)


def test_a_mistake_is_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from carrara.cli import main; main()", "data", "check", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "there is no data at" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_the_commands_import_neither_torch_nor_datasets() -> None:
    script = "import sys, carrara.cli.data; print({'torch', 'datasets', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["[INST]", "[bold]x", ":smile:", "[red]"])
def test_names_of_classes_are_no_markup(tmp_path: Path, name: str) -> None:
    for own in (name, "other"):
        folder(tmp_path / "[v2]" / own, files(4))
    result = RUNNER.invoke(app, ["check", str(tmp_path / "[v2]"), "--batch-size", "4"])
    assert result.exit_code == 0, result.output
    assert name in result.stdout
    assert "[v2]" in result.stdout
