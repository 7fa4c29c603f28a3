"""Import and export as use cases: what their generators yield, and that they refuse before they read a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from carrara.app.convert import ExportRequest, ImportRequest, export, import_
from carrara.app.events import Saved, StepDone
from tests.convert.models import codec, model
from tests.errors import refused


def test_a_model_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    model("a class", codec("kl")).save(tmp_path / "model")
    events = list(export(ExportRequest(model=tmp_path / "model", out=tmp_path / "a.ckpt")))
    assert [type(event) for event in events] == [StepDone, Saved]
    events = list(import_(ImportRequest(path=tmp_path / "a.ckpt", out=tmp_path / "again")))
    saved = events[-1]
    assert isinstance(saved, Saved)
    assert (saved.what, saved.path, saved.about["layout"]) == ("model", tmp_path / "again", "compvis")
    assert (tmp_path / "again" / "config.json").is_file()


@pytest.mark.parametrize("steps", [0, -1])
def test_a_process_without_steps_is_refused(steps: int) -> None:
    with refused("invalid", key="diffusion_steps"):
        ImportRequest(path="a.pt", diffusion_steps=steps)


def test_a_taken_folder_and_an_unwritable_one_are_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with refused("exists", key=str(tmp_path / "taken")):
        next(import_(ImportRequest(path=tmp_path / "absent.pt", out=tmp_path / "taken")))
    with refused("exists", key="out"):
        next(import_(ImportRequest(path=tmp_path / "absent.pt", out=tmp_path / "taken" / "file" / "in")))
    with refused("exists", key="out"):
        next(export(ExportRequest(model=tmp_path / "absent", out=tmp_path / "taken" / "file" / "in.pt")))
