"""Precision, recall, density, coverage: the definitions by brute force, and what they are for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carrara.evaluation import density_coverage, precision_recall, products
from tests.errors import refused


def draw(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def brute(x: Tensor, y: Tensor, k: int) -> tuple[float, float, float, float]:
    """The four shares from the definitions, one ball after the other."""

    def radius(points: Tensor, i: int) -> float:
        return float(sorted((points[i] - p).norm() for j, p in enumerate(points) if j != i)[k - 1])

    balls_x, balls_y = [radius(x, i) for i in range(len(x))], [radius(y, i) for i in range(len(y))]
    inside = [[float((a - b).norm()) <= r for b, r in zip(y, balls_y, strict=True)] for a in x]
    reached = [any(float((a - b).norm()) <= r for a, r in zip(x, balls_x, strict=True)) for b in y]
    return (
        sum(any(row) for row in inside) / len(x),
        sum(reached) / len(y),
        sum(sum(row) for row in inside) / (k * len(x)),
        sum(any(row[j] for row in inside) for j in range(len(y))) / len(y),
    )


@settings(max_examples=15, deadline=None)
@given(n=st.integers(5, 20), m=st.integers(5, 20), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_definitions(n: int, m: int, k: int, seed: int) -> None:
    x, y = draw(n, 3, seed), draw(m, 3, seed + 100) * 1.5
    pr, dc = precision_recall(x, y, k), density_coverage(x, y, k)
    assert (pr.precision, pr.recall, dc.density, dc.coverage) == pytest.approx(brute(x, y, k), abs=1e-12)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(70, 4, 0), draw(50, 4, 1)
    whole = precision_recall(x, y), density_coverage(x, y)
    monkeypatch.setattr(products, "BLOCK", 13)
    assert (precision_recall(x, y), density_coverage(x, y)) == whole


def test_one_mode_of_two_is_precise_but_has_no_recall() -> None:
    left, right = draw(300, 4, 0), draw(300, 4, 1) + 20
    reference = torch.cat([left, right])
    collapsed = precision_recall(draw(600, 4, 2), reference)
    assert collapsed.precision > 0.9
    assert collapsed.recall < 0.55
    assert density_coverage(draw(600, 4, 2), reference).coverage < 0.55


def test_one_mode_too_many_has_recall_but_is_not_precise() -> None:
    samples = torch.cat([draw(300, 4, 2), draw(300, 4, 3) + 20])
    spread = precision_recall(samples, draw(600, 4, 0))
    assert spread.precision < 0.55
    assert spread.recall > 0.85


def test_equal_distributions_have_density_one() -> None:
    result = density_coverage(draw(2000, 8, 0), draw(2000, 8, 1))
    # Naeem et al., section 3.3: E density = 1 and E coverage = 1 - Π (M-i)/(2M-i) ~ 1 - 2⁻⁵ for N = M.
    assert result.density == pytest.approx(1, abs=0.05)
    assert result.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_copies_are_perfect_and_lie_inside_their_balls() -> None:
    x = draw(100, 4, 0)
    assert precision_recall(x, x).precision == precision_recall(x, x).recall == 1
    same = torch.ones(10, 4)
    assert precision_recall(same, same).precision == 1  # closed balls of radius 0


def test_intervals_hold_their_value() -> None:
    x, y = draw(200, 4, 0) * 1.2, draw(300, 4, 1)
    pr, dc = precision_recall(x, y), density_coverage(x, y)
    for value, interval in [
        (pr.precision, pr.precision_interval),
        (pr.recall, pr.recall_interval),
        (dc.density, dc.density_interval),
        (dc.coverage, dc.coverage_interval),
    ]:
        assert interval.low < value < interval.high


def test_mistakes_are_told() -> None:
    with refused("missing", "n"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with refused("shape", "features"):
        density_coverage(torch.zeros(9, 2), torch.zeros(9, 3))
