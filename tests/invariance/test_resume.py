"""Stopped anywhere, by anything, and taken up again: the same bits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from carrara.training import Trainer
from tests.invariance.kills import CHOICES, Strike, attempt, campaign
from tests.processes import together
from tests.runs import tiny_recipe, train
from tests.training.test_loop import assert_same_bits

LAST = 24
MANY = (
    f"training.steps={LAST}",
    "training.checkpoint_every=5",
    "training.log_every=4",
    f"training.sample_every={LAST}",
    "training.tracker=none",
    "sampling.count=2",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "straight"
    train(tiny_recipe(*MANY, "network.dropout=0.1"), folder)
    return folder


@pytest.mark.parametrize("stop_at", sorted(random.Random(0).sample(range(1, LAST), 20)))
def test_broken_off_after_any_step(straight: Path, tmp_path: Path, stop_at: int) -> None:
    recipe = tiny_recipe(*MANY, "network.dropout=0.1")
    steps = Trainer(recipe, tmp_path).steps()
    while next(steps).step < stop_at:
        pass
    steps.close()  # type: ignore[attr-defined]
    resumed = Trainer(recipe, tmp_path)
    assert resumed.step == stop_at // 5 * 5
    list(resumed.steps())
    assert_same_bits(straight, tmp_path, LAST)


def straight_and_broken(folder: Path, rows: list[tuple[int, float, int]]) -> None:
    """For each choice of (micro-batch, dropout, workers): a straight run, and one broken off in between."""
    for micro_batch, dropout, workers in rows:
        recipe = tiny_recipe(
            *MANY,
            "training.steps=4",
            "training.checkpoint_every=2",
            "training.log_every=2",
            f"training.micro_batch={micro_batch}",
            f"network.dropout={dropout}",
            f"data.workers={workers}",
            "data.cache=none",  # workers are used only where images are not kept
        )
        place = folder / f"{micro_batch}-{dropout}-{workers}"
        train(recipe, place / "straight")
        steps = Trainer(recipe, place / "broken").steps()
        while next(steps).step < 3:
            pass
        steps.close()  # type: ignore[attr-defined]
        train(recipe, place / "broken")


def test_pairs_of_accumulation_dropout_processes_and_workers(tmp_path: Path) -> None:
    """Four choices of two, each pair of which meets in all four ways (the case without any is tested above)."""
    alone, two = [(3, 0.2, 2)], [(16, 0.2, 2), (3, 0.0, 2), (3, 0.2, 0)]
    together(1, straight_and_broken, tmp_path / "1", alone)
    together(2, straight_and_broken, tmp_path / "2", two)
    for place in (*(tmp_path / "1").iterdir(), *(tmp_path / "2").iterdir()):
        assert_same_bits(place / "straight", place / "broken", 4)


def test_killed_five_times_once_within_a_write(tmp_path: Path) -> None:
    assert attempt(tmp_path / "first", Strike("operation", 3)) == "writing"
    assert Trainer(tiny_recipe(*CHOICES), tmp_path / "first").step == 0, "half a checkpoint counts for nothing"
    counts = campaign(tmp_path, 4)
    assert counts["finished"] >= 1


@pytest.mark.slow
def test_killed_a_thousand_times(tmp_path: Path) -> None:
    counts = campaign(tmp_path, 1000)
    assert counts["writing"] > 100
