"""Extrapolation to infinite n: the truth of two Gaussians is met where finite n is far off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.evaluation import Statistics, frechet_distance, frechet_infinity
from tests.errors import refused

DIMENSION = 16
REFERENCE = Statistics(torch.zeros(DIMENSION, dtype=torch.float64), torch.eye(DIMENSION, dtype=torch.float64))
TRUTH = DIMENSION * 0.1**2
"""Standard deviations of 1.1 against 1: Σ(1.1 - 1)²."""


def draw(n: int, seed: int) -> Tensor:
    return 1.1 * torch.randn(n, DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_bias_is_removed_and_the_error_bar_is_honest() -> None:
    results = [frechet_infinity(draw(400, seed), REFERENCE, seed=seed) for seed in range(40)]
    finite = torch.tensor([r.finite for r in results])
    values = torch.tensor([r.value for r in results])
    error = float(values.std()) / 40**0.5
    assert float(finite.mean()) > TRUTH + 10 * error  # 400 samples are far off
    # Second order in 1/N remains, about (D/N)² of the spread's trace: 3 standard errors and that.
    assert abs(float(values.mean()) - TRUTH) < 3 * error + 19 * (DIMENSION / 400) ** 2
    held = sum(r.interval.low <= TRUTH <= r.interval.high for r in results)
    assert held >= 34  # 38 of 40 expected; 34 is 3 standard deviations of that count below


def test_the_line_passes_through_the_finite_value() -> None:
    rows = draw(500, 0)
    result = frechet_infinity(rows, REFERENCE)
    assert result.finite == pytest.approx(frechet_distance(rows, REFERENCE), rel=1e-9)
    assert result.value == pytest.approx(result.finite - result.slope / 500, rel=1e-9)
    assert result.slope > 0


def test_draws_depend_on_the_seed_alone() -> None:
    assert frechet_infinity(draw(200, 0), REFERENCE) == frechet_infinity(draw(200, 0), REFERENCE)
    assert frechet_infinity(draw(200, 0), REFERENCE) != frechet_infinity(draw(200, 0), REFERENCE, seed=1)


def test_too_few_samples_are_refused() -> None:
    with refused("missing", "n"):
        frechet_infinity(draw(17, 0), REFERENCE)
