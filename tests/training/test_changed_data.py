"""A run does not resume on other data unless that is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from carrara.recipe import Recipe
from carrara.training import Trainer
from carrara.training.resume import check_data
from tests.data.builders import folder, png
from tests.errors import refused
from tests.runs import tiny_recipe, train

CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one more": (lambda path: Image.new("L", (8, 8)).save(path / "b" / "9.png"), "number of images (16 then, 17 now)"),
    "one class more often": (lambda path: (path / "b" / "00.png").rename(path / "a" / "99.png"), "labels"),
    "other pixels": (lambda path: (path / "a" / "00.png").write_bytes(png(99, 8, 8)), "content of images"),
}


def data(tmp_path: Path) -> Path:
    return folder(tmp_path / "data", {f"{c}/{i:02d}.png": png(i, 8, 8) for c in "ab" for i in range(8)})


def recipe_of(data: Path, *assignments: str) -> Recipe:
    run = ("training.steps=4", "training.checkpoint_every=2", "training.batch_size=8", "training.decay=constant")
    return tiny_recipe(f"data.path={data}", "data.channels=3", "sampling.count=2", *run, *assignments)


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused_by_what_changed_unless_that_is_accepted(change: str, tmp_path: Path) -> None:
    path, run = data(tmp_path), tmp_path / "run"
    train(recipe_of(path), run)
    make, sentence = CHANGES[change]
    make(path)
    longer = recipe_of(path, "training.steps=5")
    before = (run / "recipe.yaml").read_text()
    with refused("mismatch", key="data.path"):
        Trainer(longer, run)
    assert (run / "recipe.yaml").read_text() == before
    trainer = Trainer(longer, run, accept_changes=True)
    assert any(sentence in notice for notice in trainer.notices)
    list(trainer.steps())
    Trainer(recipe_of(path, "training.steps=6"), run).run.close()  # its checkpoint is of these data


def test_a_folder_that_moved_and_an_older_checkpoint_resume(tmp_path: Path) -> None:
    path, run = data(tmp_path), tmp_path / "run"
    train(recipe_of(path), run)
    moved = path.rename(tmp_path / "moved")
    trainer = Trainer(recipe_of(moved, "training.steps=5"), run, accept_changes=True)
    assert not any("the data of" in notice for notice in trainer.notices)
    trainer.run.close()
    assert list(check_data({"step": 1}, {"number of images": 1}, run, accept_changes=False)) == []
