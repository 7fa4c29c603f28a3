"""Table 1 of Song et al. 2021 on exact oracles: no network, no data, only the solvers (docs/math.md §5, §13).

Cells and spacing are those of `carrara evaluate --table ddim`. On a Gaussian whose variances fall like those of images
every solver is affine in its normal numbers, so the Fréchet distance of every cell is known without any sampling. The
mixture of `GaussianMixture` shows the same with samples and their intervals.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.evaluation import Interval, Statistics, frechet_distance, frechet_interval
from carrara.evaluation.tables import DEFAULTS, ETAS, PUBLISHED, cells
from carrara.process import GaussianMixture, GivenNoise, Noise, Prediction, grids, schedules
from carrara.process.schedules import Schedule, Time
from carrara.solvers import Solver, solve

SCHEDULE: Schedule = schedules.linear(1000)
SPECTRUM = torch.arange(1, 65, dtype=torch.float64) ** -2.0


def spectral(x: Tensor, t: Time, condition: Condition) -> Prediction:
    """The exact denoiser of N(0, diag SPECTRUM): E[x_0|x_t] = a v/(a² v + s²) x_t in every dimension."""
    a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    return Prediction.from_x0(x, a * SPECTRUM / (a**2 * SPECTRUM + s**2) * x, a, s)


def exact(solver: Solver, steps: int, spacing: str) -> float:
    """The distance Σ (σ - √v)² of what a solver draws. Each normal number is turned on alone, in a row of its own: the
    variance σ² of the end is the sum of squares over the rows."""
    grid = getattr(grids, spacing)(SCHEDULE, steps)
    alone = torch.eye(len(grid) + 1, dtype=torch.float64)
    draws = tuple(alone[:, k : k + 1].expand(-1, len(SPECTRUM)) for k in range(len(alone)))
    start = draws[0] * SCHEDULE.sigma(float(grid.times[0]))
    end = solve(spectral, SCHEDULE, solver, grid, start, noise=GivenNoise(tensors=draws))
    return float((end.square().sum(0).sqrt() - SPECTRUM.sqrt()).square().sum())


@pytest.fixture(scope="module")
def leading() -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for cell in cells("ddim", SCHEDULE):
        steps = cell.choices["steps"]
        found.setdefault(cell.line, {})[steps] = exact(cell.choices["solver"], steps, DEFAULTS["ddim"]["spacing"])
    return found


def test_without_noise_is_best_at_few_steps(leading: dict[str, dict[int, float]]) -> None:
    """η = 0 < 0.2 < 0.5 < 1 < σ̂ at 10 and 20 steps, as published in both columns."""
    for place, steps in enumerate((10, 20)):
        for known in PUBLISHED.values():
            assert list(known) == sorted(known, key=lambda line: known[line][place])
        assert list(ETAS) == sorted(ETAS, key=lambda line: leading[line][steps])


def test_the_large_noise_is_catastrophic_at_ten_steps_and_best_with_all(leading: dict[str, dict[int, float]]) -> None:
    """Published: 27 and 17 times the distance of η = 0 at 10 steps, and the smallest of all at 1,000."""
    assert [round(rows["σ̂"][0] / rows["η 0"][0]) for rows in PUBLISHED.values()] == [28, 17]
    assert leading["σ̂"][10] > 17 * leading["η 0"][10]
    assert min(leading, key=lambda line: leading[line][1000]) == "σ̂"


def test_more_steps_are_always_better(leading: dict[str, dict[int, float]]) -> None:
    for line in ETAS:
        values = list(leading[line].values())
        assert list(leading[line]) == [10, 20, 50, 100, 1000]
        assert values == sorted(values, reverse=True), line


def test_the_catastrophe_is_noise_that_comes_too_late(leading: dict[str, dict[int, float]]) -> None:
    """Leading grids walk a long pair down to t = 1, where what σ̂ adds can no longer be taken away. Trailing grids of
    as many steps end with a long pair to the clean image, which adds nothing, and the catastrophe is gone."""
    trailing = {line: exact(ETAS[line], 10, "trailing") for line in ("η 0", "σ̂")}
    assert leading["σ̂"][10] > 50 * trailing["σ̂"]
    assert trailing["σ̂"] < trailing["η 0"]


def test_wide_data_forgive_the_large_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scanned digits have few dimensions narrower than that noise, and a cosine schedule little of it near t = 1:
    with their spectrum σ̂ is no worse than η = 0 at ten steps, which is why a table of a digits model differs."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().data) / 8 - 1
    spectrum = torch.linalg.eigvalsh(pixels.T.cov()).clamp_min(0)
    monkeypatch.setattr(f"{__name__}.SPECTRUM", spectrum)
    monkeypatch.setattr(f"{__name__}.SCHEDULE", schedules.cosine(1000))
    assert exact(ETAS["σ̂"], 10, "leading") < exact(ETAS["η 0"], 10, "leading")
    assert exact(ETAS["η 0"], 10, "leading") < exact(ETAS["η 1"], 10, "leading")


class TestMixture:
    """4 components in 64 dimensions, as narrow as an image's detail; 2,000 samples, 200 levels."""

    schedule = schedules.linear(200)
    means = 0.5 * Noise(1).normal((4, 64), dtype=torch.float64)
    oracle = GaussianMixture([0.25] * 4, means, [0.002] * 4)

    @pytest.fixture(scope="class")
    def table(self) -> dict[str, dict[int, tuple[float, Interval]]]:
        centred = self.means - self.means.mean(0)
        covariance = centred.T @ centred / 4 + 0.002 * torch.eye(64, dtype=torch.float64)
        known = Statistics(self.means.mean(0), covariance)
        found: dict[str, dict[int, tuple[float, Interval]]] = {}
        start = Noise(7).normal((2000, 64), dtype=torch.float64)
        for cell in cells("ddim", self.schedule):
            grid = grids.leading(self.schedule, cell.choices["steps"])
            denoiser = self.oracle.denoiser(self.schedule)
            end = solve(denoiser, self.schedule, cell.choices["solver"], grid, start, noise=Noise(7))
            value = frechet_distance(end, known), frechet_interval(end, known)
            found.setdefault(cell.line, {})[cell.choices["steps"]] = value
        return found

    def test_the_shape_beyond_chance(self, table: dict[str, dict[int, tuple[float, Interval]]]) -> None:
        ten = {line: row[10] for line, row in table.items()}
        assert ten["σ̂"][1].low > 17 * ten["η 0"][1].high
        assert ten["η 0"][1].low < ten["η 1"][1].high
        assert table["σ̂"][200][1].low < table["η 0"][200][1].high
        for line, row in table.items():
            for few, more in zip(sorted(row), sorted(row)[1:], strict=False):
                # Never worse than the chance of 2,000 draws allows.
                assert row[more][1].low < row[few][1].high, (line, few, more)
            assert row[200][0] < row[10][0], line
