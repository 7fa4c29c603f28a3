"""The Fréchet distance: closed forms, other implementations on the same features, invariances."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carrara.evaluation import Moments, Statistics, frechet_distance, frechet_interval
from carrara.evaluation.frechet import _influence, normal
from tests.errors import refused


def features(n: int, d: int, seed: int, decay: float = 2.0, shift: float = 0.0) -> Tensor:
    """Correlated features whose standard deviations fall over `decay` decades, as those of networks do."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -decay, d, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))).Q
    rows: Tensor = torch.randn(n, d, dtype=torch.float64, generator=draw) * scale @ basis + shift
    return rows


def by_sqrtm(x: Tensor, y: Tensor) -> float:
    """The distance as the first implementations took it: the real part of scipy's matrix square root."""
    mean_x, mean_y = x.mean(0).numpy(), y.mean(0).numpy()
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    shift = ((mean_x - mean_y) ** 2).sum()
    return float(shift + np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(root).real)


def by_torchmetrics(x: Tensor, y: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = x.shape[1]

        def forward(self, rows: Tensor) -> Tensor:
            return rows

    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    return float(metric.compute())


@pytest.mark.parametrize("d", [64, 192, 768])
def test_equals_scipy_and_torchmetrics(d: int) -> None:
    x, y = features(2 * d, d, 0), features(3 * d, d, 1, decay=1.8, shift=0.01)
    value = frechet_distance(x, y)
    assert value == pytest.approx(by_sqrtm(x, y), rel=1e-6)
    assert value == pytest.approx(by_torchmetrics(x, y), rel=1e-6)
    assert value == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-12)


@pytest.mark.slow
def test_equals_scipy_and_torchmetrics_in_2048_dimensions() -> None:
    x, y = features(4000, 2048, 0), features(3000, 2048, 1, decay=1.8, shift=0.01)
    value = frechet_distance(x, y)
    assert value == pytest.approx(by_sqrtm(x, y), rel=1e-6)
    assert value == pytest.approx(by_torchmetrics(x, y), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 64), (40, 500, 64), (500, 40, 64), (100, 120, 768), (64, 65, 64)])
def test_few_rows_equal_torchmetrics_and_scipy_without_regularising(n: int, m: int, d: int) -> None:
    x, y = features(n, d, 0), features(m, d, 1, shift=0.02)
    value = frechet_distance(x, y)
    # The others take roots of eigenvalues that ought to be 0 and are 1e-16: each adds up to 1e-8 of the scale.
    assert value == pytest.approx(by_torchmetrics(x, y), rel=1e-6)
    assert value == pytest.approx(by_sqrtm(x, y), rel=1e-6)
    assert value == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-6)


def test_few_rows_equal_the_same_rows_in_a_basis_of_their_own() -> None:
    """Rows that fill 20 of 300 dimensions: the distance is that of their 20 coordinates, a well-posed case."""
    x, y = features(200, 20, 0), features(250, 20, 1, shift=0.3)
    frame = torch.linalg.qr(torch.randn(300, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    # Both factorings are exact to rounding; 300 rounding errors of 1e-16 under a root give 1e-8 at worst.
    assert frechet_distance(x @ frame.T, y @ frame.T) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_gaussians_have_a_closed_form() -> None:
    """Commuting covariances: d² = |Δμ|² + Σ (√λ₁ - √λ₂)²."""
    basis = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    first, second = torch.linspace(0.1, 3, 50, dtype=torch.float64), torch.linspace(2, 0.5, 50, dtype=torch.float64)
    mean = torch.linspace(-1, 1, 50, dtype=torch.float64)
    a = Statistics(mean, basis * first @ basis.T)
    b = Statistics(torch.zeros_like(mean), basis * second @ basis.T)
    expected = mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_one_dimension_is_the_difference_of_means_and_deviations() -> None:
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)  # mean 1, deviation √2
    y = torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64)  # mean 3, deviation 2
    assert frechet_distance(x, y) == pytest.approx(4 + (2 - 2**0.5) ** 2, rel=1e-14)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), m=st.integers(2, 60), d=st.integers(1, 40), seed=st.integers(0, 99))
def test_it_is_symmetric_not_negative_and_blind_to_rotation_and_shift(n: int, m: int, d: int, seed: int) -> None:
    x, y = features(n, d, seed), features(m, d, seed + 1, shift=0.5)
    value = frechet_distance(x, y)
    scale = float(x.var(0).sum() + y.var(0).sum()) + value  # distances are differences of numbers this large
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    assert value >= 0
    assert frechet_distance(y, x) == pytest.approx(value, abs=1e-7 * scale)
    assert frechet_distance(x @ turn + 2, y @ turn + 2) == pytest.approx(value, abs=1e-7 * scale)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * value, abs=9e-7 * scale)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-7 * scale)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-7 * scale)


def test_identical_images_have_no_spread_and_no_trouble() -> None:
    same = torch.ones(10, 4, dtype=torch.float64)
    other = features(50, 4, 0)
    assert frechet_distance(same, same) == 0
    # Zero variance: what is left is |Δμ|² + Tr Σ₂.
    expected = float((1 - other.mean(0)).square().sum() + other.var(0).sum())
    assert frechet_distance(same, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(Moments.of(same), Moments.of(other)) == pytest.approx(expected, rel=1e-12)


def test_constant_pixels_do_not_hurt() -> None:
    x, y = features(300, 10, 0), features(300, 10, 1, shift=0.1)
    padded = [torch.cat([rows, torch.zeros(300, 6, dtype=torch.float64)], 1) for rows in (x, y)]
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "widest"), [(20, 1.8), (64, 1.7), (200, 1.6), (2000, 1.2)])
def test_the_interval_is_as_wide_as_fresh_draws_spread_or_a_little_wider(n: int, widest: float) -> None:
    """A spread over two decades in 32 dimensions, from fewer rows than dimensions to many more."""
    reference = Moments.of(features(5000, 32, 0))
    draws = torch.tensor([frechet_distance(features(n, 32, s, shift=0.05), reference) for s in range(1, 121)])
    intervals = [frechet_interval(features(n, 32, s, shift=0.05), reference) for s in range(1, 13)]
    width = sum(i.high - i.low for i in intervals) / len(intervals) / (2 * 1.96)
    # 120 draws know their deviation to 6.5 %, twelve intervals theirs to a few %: 0.8 is 2 such errors below 1.
    assert 0.8 < width / float(draws.std()) < widest


def test_the_interval_lies_around_the_value_and_depends_on_the_seed_alone() -> None:
    x, reference = features(300, 16, 1, shift=0.2), Moments.of(features(1000, 16, 0))
    interval = frechet_interval(x, reference)
    assert interval.low < frechet_distance(x, reference) < interval.high
    assert interval == frechet_interval(x, reference)
    assert interval != frechet_interval(x, reference, seed=1)


def test_influence_is_the_derivative_by_a_rows_weight() -> None:
    """Doubling one row of many moves the distance by its influence over N, up to 1/N²."""
    x, reference = features(20000, 8, 1, shift=0.1), Moments.of(features(3000, 8, 0))
    influence = _influence(x, normal(x), normal(reference))
    assert float(influence.mean()) == pytest.approx(0, abs=1e-12)
    before = frechet_distance(x, reference)
    for row in (0, 7, int(influence.argmax())):
        doubled = torch.cat([x, x[row : row + 1]])
        # What is left is of second order in the weight 1/20,000, and ddof 1: influences here reach 0.7.
        assert (frechet_distance(doubled, reference) - before) * 20001 == pytest.approx(float(influence[row]), abs=5e-3)


def test_identical_images_have_an_interval_too() -> None:
    interval = frechet_interval(torch.ones(10, 4), Moments.of(features(50, 4, 0)))
    assert interval.low == pytest.approx(interval.high)
    assert frechet_interval(features(50, 4, 0), torch.ones(10, 4)).low > 0


def test_mistakes_are_told() -> None:
    with refused("shape", "features"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))
    with refused("missing", "n"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with refused("not_finite", "features"):
        frechet_distance(torch.full((5, 3), torch.nan), torch.zeros(5, 3))
