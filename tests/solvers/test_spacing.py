"""Grids by a word; those that are optimised for a solver are kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from carrara.process import grids, schedules
from carrara.solvers import DDIM, SPACINGS, UniPC, grid_of, spacing
from tests.errors import refused

SCHEDULE = schedules.linear(100)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARRARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times a grid is searched for; the search itself is cut short."""
    made: list[int] = []

    def search(schedule: schedules.Schedule, solver: object, steps: int) -> grids.Grid:
        made.append(steps)
        return grids.log_snr(schedule, steps, [0.3, -0.3])

    monkeypatch.setattr(spacing, "optimised_grid", search)
    return made


@pytest.mark.parametrize("word", sorted(SPACINGS))
def test_a_word_is_its_constructor(word: str) -> None:
    assert grid_of(word, SCHEDULE, 5, DDIM()) == SPACINGS[word](SCHEDULE, 5)


def test_an_optimised_grid_is_searched_once_for_each_schedule_solver_and_count(searches: list[int]) -> None:
    first = grid_of("optimised", SCHEDULE, 5, UniPC())
    again = grid_of("optimised", SCHEDULE, 5, UniPC())
    assert torch.equal(first.times, again.times)
    assert (first.name, searches) == ("optimised", [5])
    for schedule, steps, solver in ((schedules.cosine(100), 5, UniPC()), (SCHEDULE, 6, UniPC()), (SCHEDULE, 5, DDIM())):
        grid_of("optimised", schedule, steps, solver)
    assert searches == [5, 5, 6, 5]


@pytest.mark.parametrize("content", ["", "[]", '{"for": "other", "times": [1, 0]}', '{"for": 1}'])
def test_a_damaged_cache_is_searched_again(searches: list[int], cache: Path, content: str) -> None:
    first = grid_of("optimised", SCHEDULE, 5, UniPC())
    (path,) = (cache / "grids").iterdir()
    path.write_text(content)
    assert grid_of("optimised", SCHEDULE, 5, UniPC()) == first
    assert searches == [5, 5]


def test_a_cache_that_cannot_be_written_is_no_error(searches: list[int], cache: Path) -> None:
    cache.write_text("a file")
    assert len(grid_of("optimised", SCHEDULE, 5, UniPC())) == 5


def test_it_is_better_than_what_it_starts_from() -> None:
    """The search itself, short: on the oracle's data a grid for five steps of DDIM errs less than even log-SNR."""
    from carrara.process import Condition, Noise
    from carrara.solvers import optimised_grid, solve
    from carrara.solvers.tuning import prior

    schedule = schedules.linear(1000)
    found = optimised_grid(schedule, DDIM(), 5, samples=12, evaluations=40)
    data = prior()
    condition = Condition(label=torch.arange(12) % data.classes)
    start = Noise(seed=1).normal((12, *data.shape), dtype=torch.float64) * schedule.sigma(schedule.final_time)
    exact = solve(data.denoiser(schedule), schedule, UniPC(order=3), grids.log_snr(schedule, 300), start, condition)
    errors = [
        float((solve(data.denoiser(schedule), schedule, DDIM(), grid, start, condition) - exact).square().mean())
        for grid in (found, grids.log_snr(schedule, 5))
    ]
    assert errors[0] < errors[1]


def test_what_cannot_be_is_refused() -> None:
    with refused("unknown", "grid"):
        grid_of("trailling", SCHEDULE, 5, DDIM())
    with refused("conflict", "grid"):
        grid_of("optimised", SCHEDULE, 5, DDIM(eta=1.0))
    with refused("mismatch", "time"):
        grid_of(grids.trailing(schedules.linear(200), 5), SCHEDULE, 5, DDIM())
    for steps in (0, 101, 2.7, "5"):
        with refused("invalid", "steps"):
            grid_of("trailing", SCHEDULE, steps, DDIM())  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[100, 0], [500, 400, 300, 200, 100, 0], [0, 1, 2, 3, 4, 5], [float("nan")] * 6, []])
def test_times_in_the_cache_that_do_not_fit_are_searched_again(
    searches: list[int], cache: Path, times: list[float]
) -> None:
    first = grid_of("optimised", SCHEDULE, 5, UniPC())
    (path,) = (cache / "grids").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "times": times}))
    assert grid_of("optimised", SCHEDULE, 5, UniPC()) == first
    assert searches == [5, 5]


def test_any_whole_number_of_steps_will_do(searches: list[int]) -> None:
    assert len(grid_of("optimised", SCHEDULE, np.int64(5), UniPC())) == 5  # type: ignore[arg-type]
