"""Aspect buckets and shard order as words of a recipe: they train, resume, and refuse what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from carrara.data import Batch
from carrara.errors import UserError
from carrara.recipe import Recipe, validate
from carrara.training import Trainer
from tests.data.builders import files, folder, png, tarred
from tests.runs import tiny_recipe, train
from tests.training.test_loop import assert_same_bits

SHAPES = ((12, 12), (12, 20), (20, 12))


def mixed(root: Path) -> Path:
    """Eight pictures of each of three shapes."""
    return folder(root, {f"{i:02d}.png": png(i, *SHAPES[i % 3]) for i in range(24)})


def shards(root: Path) -> Path:
    for number in range(3):
        tarred(root / f"{number}.tar", {f"{i:02d}.png": png(i) for i in range(8 * number, 8 * number + 8)})
    return root


def recipe_of(data: Path, *assignments: str) -> Recipe:
    return tiny_recipe(
        f"data.path={data}",
        "data.channels=3",
        "conditioning.kind=none",
        "sampling.guidance=1",
        "sampling.count=2",
        "training.steps=6",
        "training.batch_size=4",
        "training.checkpoint_every=2",
        "training.tracker=none",
        *assignments,
    )


ORDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "auto": (mixed, "data.buckets=auto"),
    "sizes": (mixed, "data.buckets=[[8,8],[6,10],[10,6]]"),
    "shards": (shards, "data.order=shards"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_it_trains_and_resumes_to_the_same_bits(order: str, tmp_path: Path) -> None:
    make, assignment = ORDERS[order]
    recipe = recipe_of(make(tmp_path / "data"), assignment)
    notices = [progress.notice for progress in train(recipe, tmp_path / "straight") if progress.notice]
    assert any("aspect buckets: " in notice for notice in notices) == (make is mixed)
    steps = Trainer(recipe, tmp_path / "broken").steps()
    while next(steps).step < 3:
        pass
    steps.close()  # type: ignore[attr-defined]
    train(recipe, tmp_path / "broken")
    assert_same_bits(tmp_path / "straight", tmp_path / "broken", 6)


def test_every_batch_is_of_one_of_the_sizes_asked_for(tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(mixed(tmp_path / "data"), "data.buckets=[[8,8],[6,10],[10,6]]"), tmp_path / "run")
    walked = [batch for batch in map(trainer.batches.at, range(30)) if isinstance(batch, Batch)]
    assert len(walked) == 30
    assert {tuple(batch.images.shape[2:]) for batch in walked} == {(8, 8), (6, 10), (10, 6)}
    assert any("6×10 (8 images), 8×8 (8 images), 10×6 (8 images)" in notice for notice in trainer.notices)
    trainer.run.close()


def test_an_epoch_in_shard_order_holds_every_picture_once(tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(shards(tmp_path / "data"), "data.order=shards"), tmp_path / "run")
    names = [name for step in range(6) for name in trainer.batches.at(step).names]
    assert len(set(names)) == 24
    trainer.run.close()


@pytest.mark.parametrize(
    ("make", "assignments", "sentence"),
    [
        (mixed, ("data.order=shards",), r"data\.order=shards is for tar shards, .* is a folder of 24 images"),
        (shards, ("data.order=shards", "data.buckets=auto"), r"leave out data\.order=shards"),
        (mixed, ("data.buckets=[[8,9]]",), "2 must divide both sides of 8×9"),
        (mixed, ("data.buckets=[]",), r"data\.buckets"),
        (mixed, ("data.buckets=square",), r"data\.buckets"),
        (mixed, ("data.order=shard",), r"data\.order"),
        (mixed, ("data.bucket=auto",), "did you mean 'buckets'"),
        (mixed, ("data.buckets=auto", "training.batch_size=25"), "holds 24 images, fewer than one batch of 25"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    make: Callable[[Path], Path], assignments: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    data = make(tmp_path / "data")
    with pytest.raises(UserError, match=sentence):
        Trainer(recipe_of(data, *assignments), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_buckets_are_for_diffusion_models_of_pixels(tmp_path: Path) -> None:
    recipe = recipe_of(mixed(tmp_path / "data"), "data.buckets=auto", "codec.path=somewhere")
    with pytest.raises(UserError, match="for diffusion models of pixels"):
        Trainer(recipe, tmp_path / "run")


def test_another_order_is_another_run(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", files(8))
    train(recipe_of(data, "training.steps=1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.buckets: None → auto"):
        Trainer(recipe_of(data, "training.steps=1", "data.buckets=auto"), tmp_path / "run")


def test_buckets_fit_the_network_that_the_run_starts_from(tmp_path: Path) -> None:
    """It halves its sides once; the default network, which the recipe does not name, would ask for more."""
    data = mixed(tmp_path / "data")
    train(recipe_of(data, "training.steps=1"), tmp_path / "base")
    same = recipe_of(data, "data.buckets=[[8,8],[6,10],[10,6]]").model_dump(
        exclude={"network", "schedule", "objective"}
    )
    recipe = validate({**same, "start": str(tmp_path / "base")})
    train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="2 must divide both sides of 7×9"):
        Trainer(
            recipe.model_copy(update={"data": recipe.data.model_copy(update={"buckets": [(7, 9)]})}), tmp_path / "b"
        )
