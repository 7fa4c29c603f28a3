"""The kernel distance: its defining double sum, torchmetrics on the same features, unbiasedness, intervals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.evaluation import kernel_distance, products
from tests.errors import refused


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def naive(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, term by term."""

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (len(y) * (len(y) - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_the_full_value_is_the_double_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(23, 7, 0), draw(31, 7, 1, 0.2)
    expected = naive(x, y)
    assert kernel_distance(x, y).full == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(products, "BLOCK", 10)  # blocks that do not divide the rows
    assert kernel_distance(x, y).full == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [64, 768, 2048])
def test_equals_torchmetrics_on_the_same_subsets(d: int) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = draw(120, d, 0), draw(90, d, 1, 0.1)
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=10, subset_size=50)
    metric.update(x, real=True)
    metric.update(y, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean, spread = metric.compute()
    ours = kernel_distance(x, y, subsets=10, subset_size=50, seed=5)
    assert ours.mean == pytest.approx(float(mean), rel=1e-6)
    assert ours.std == pytest.approx(float(spread), rel=1e-6)


def test_it_is_unbiased_where_the_distributions_agree() -> None:
    values = torch.tensor([kernel_distance(draw(40, 5, 2 * s), draw(40, 5, 2 * s + 1), 1).full for s in range(60)])
    # The mean of 60 draws lies within 3 standard errors of 0.
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5
    assert float(values.min()) < 0 < float(values.max())


def test_a_shift_is_seen_and_order_is_not() -> None:
    x, y = draw(300, 16, 0), draw(300, 16, 1, 0.5)
    assert kernel_distance(x, y).full > 10 * abs(kernel_distance(x, draw(300, 16, 2)).full)
    assert kernel_distance(x.flip(0), y).full == pytest.approx(kernel_distance(x, y).full, rel=1e-10)


def test_subsets_depend_on_the_seed_alone() -> None:
    x, y = draw(60, 4, 0), draw(60, 4, 1)
    first, again, other = (kernel_distance(x, y, 5, 20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.mean != other.mean
    assert first.full == other.full


def test_small_sets_shrink_the_subsets_and_say_so() -> None:
    result = kernel_distance(draw(30, 4, 0), draw(500, 4, 1), subsets=3)
    assert result.subset_size == 30


def test_the_interval_holds_the_value_and_narrows_with_more_samples() -> None:
    reference = draw(1000, 8, 0)
    few, many = (kernel_distance(draw(n, 8, 1, 0.3), reference).interval for n in (100, 1600))
    assert few.low < kernel_distance(draw(100, 8, 1, 0.3), reference).full < few.high
    # √16 = 4 times narrower in expectation; half of that is beyond chance with 200 replicates.
    assert (many.high - many.low) * 2 < few.high - few.low


def test_identical_images() -> None:
    same = torch.ones(10, 4)
    assert kernel_distance(same, same).full == pytest.approx(0, abs=1e-12)


def test_mistakes_are_told() -> None:
    with refused("shape", "features"):
        kernel_distance(torch.zeros(5, 3), torch.zeros(5, 4))
    with refused("missing", "n"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with refused("not_finite", "reference features"):
        kernel_distance(torch.zeros(5, 3), torch.full((5, 3), torch.nan))
