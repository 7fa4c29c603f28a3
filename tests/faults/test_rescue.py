"""What ends a run loses nothing, what no run depends on does not end it, and what is refused changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.errors import UserError
from carrara.recipe import Recipe, validate
from carrara.training import Trainer, checkpoint
from tests.errors import refused
from tests.runs import tiny_recipe, train

QUIET = ("training.checkpoint_every=1000", "training.tracker=none", "sampling.count=2")


def notices(recipe: Recipe, folder: Path) -> list[str]:
    return [progress.notice for progress in Trainer(recipe, folder).steps() if progress.notice]


def boom(*_: object, **__: object) -> Any:
    raise OSError(28, "No space left on device")


def test_a_preview_that_cannot_be_written_is_a_notice(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(*QUIET, "training.sample_every=4"), tmp_path / "run")
    (tmp_path / "run" / "samples").write_text("a file")
    found = [progress.notice for progress in trainer.steps() if progress.notice]
    assert sum("the preview of step" in notice for notice in found) == 3
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), UserError("no"), ZeroDivisionError("0")])
def test_a_preview_that_fails_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> Any:
        raise error

    monkeypatch.setattr("carrara.training.diffusion.DiffusionTask.preview", fails)
    assert any("the preview of step 12" in notice for notice in notices(tiny_recipe(*QUIET), tmp_path / "run"))


def test_a_validation_that_fails_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carrara.training.loop.validate", boom)
    words = ("training.validate_every=6", "training.validation_images=16")
    found = notices(tiny_recipe(*QUIET, *words), tmp_path / "run")
    assert sum("validation of step" in notice for notice in found) == 2


@pytest.mark.parametrize(
    "target",
    ["carrara.training.log.Log.write", "carrara.training.loop.Trainer._write_log"],
)
def test_what_ends_a_healthy_run_saves_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(target, boom)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_recipe(*QUIET), tmp_path / "run")
    newest, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest == 4  # the log is written every four steps


def test_images_that_are_gone_end_a_run_that_can_be_resumed_to_the_bit(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for number in range(32):
        (pictures / str(number % 2)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.Generator(np.random.Philox(number)).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / str(number % 2) / f"{number}.png")
    recipe = tiny_recipe(*QUIET, f"data.path={pictures}", "training.sample_every=100")
    train(recipe, tmp_path / "whole")
    trainer = Trainer(recipe, tmp_path / "run")
    steps = trainer.steps()
    while next(steps).step < 3 or trainer.step < 3:
        pass
    trainer.one_step = boom  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        next(steps)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] == 3
    train(recipe, tmp_path / "run")
    ours, theirs = ((tmp_path / name / "model" / "network.safetensors").read_bytes() for name in ("run", "whole"))
    assert ours == theirs


@pytest.mark.parametrize("words", [("network.channels=16",), ("network.blocks_per_level=2",), ("training.steps=6",)])
def test_a_resume_that_is_refused_leaves_the_recipe(tmp_path: Path, words: tuple[str, ...]) -> None:
    train(tiny_recipe(*QUIET), tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(UserError):
        Trainer(tiny_recipe(*QUIET, *words), tmp_path / "run", accept_changes=True)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    assert train(tiny_recipe(*QUIET), tmp_path / "run") is not None  # the original command works still


def test_fewer_steps_than_the_run_has_are_refused(tmp_path: Path) -> None:
    words = (*QUIET, "training.decay=constant")
    train(tiny_recipe(*words), tmp_path / "run")
    with refused("conflict", "training.steps"):
        Trainer(tiny_recipe(*words, "training.steps=6"), tmp_path / "run")


def classes(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(np.full((8, 8), 40 * number + index, dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_classes_may_move_where_nothing_is_trained_on_them(tmp_path: Path) -> None:
    data = classes(tmp_path / "data", "apple", "cat")
    words = (f"data.path={data}", "training.batch_size=8", "conditioning.kind=none", "sampling.guidance=1")
    train(tiny_recipe(*QUIET, *words), tmp_path / "run")
    (data / "apple").rename(data / "zebra")
    with refused("mismatch", "data.path"):  # the images come in another order
        Trainer(tiny_recipe(*QUIET, *words), tmp_path / "run")
    Trainer(tiny_recipe(*QUIET, *words), tmp_path / "run", accept_changes=True).run.close()


@pytest.mark.parametrize("moved", ["zebra", "ape"])
def test_classes_that_moved_are_refused_and_mapped_by_name(tmp_path: Path, moved: str) -> None:
    data = classes(tmp_path / "data", "apple", "cat")
    recipe = tiny_recipe(*QUIET, f"data.path={data}", "training.batch_size=8")
    train(recipe, tmp_path / "run")
    (data / "apple").rename(data / moved)
    with refused("mismatch", "data.path"):
        Trainer(recipe, tmp_path / "run")
    tuned = validate(
        {
            "name": "tuned",
            "start": str(tmp_path / "run"),
            "data": {"path": str(data), "resolution": 8, "channels": 1},
            "conditioning": {"kind": "labels", "dropout": 0.1},
            "training": {"steps": 1, "batch_size": 8, "tracker": "none"},
        }
    )
    base = Trainer(tuned, tmp_path / "tuned").network.state_dict()["label.weight"]
    from carrara import DiffusionModel

    table = DiffusionModel.load(tmp_path / "run").network.state_dict()["label.weight"]
    names = sorted(("cat", moved))
    assert torch.equal(base[names.index("cat")], table[1])  # cat was class 1 beside apple
    assert torch.equal(base[2], table[2])  # no class
    assert not torch.equal(base[names.index(moved)], table[0])
