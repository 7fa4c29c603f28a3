"""The Inception score: limits, torchmetrics on the same logits, invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.evaluation import inception_score
from tests.errors import refused


def logits(n: int, k: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k", "splits"), [(500, 10, 10), (333, 1008, 10), (64, 10, 1)])
def test_equals_torchmetrics(n: int, k: int, splits: int) -> None:
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=torch.nn.Identity(), splits=splits)
    metric.update(logits(n, k))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mean, spread = metric.compute()
    ours = inception_score(logits(n, k), splits, seed=3)
    assert ours.mean == pytest.approx(float(mean), rel=1e-6)
    if splits > 1:
        assert ours.std == pytest.approx(float(spread), rel=1e-6)


def test_sure_and_balanced_is_the_number_of_classes() -> None:
    sure = 100 * torch.eye(10, dtype=torch.float64).repeat(30, 1)
    assert inception_score(sure, splits=1).full == pytest.approx(10, rel=1e-9)


def test_sure_of_one_class_or_never_sure_is_one() -> None:
    one = torch.zeros(50, 10)
    one[:, 3] = 100
    assert inception_score(one).full == pytest.approx(1)
    assert inception_score(torch.zeros(50, 10)).full == pytest.approx(1)


def test_impossible_classes_do_not_make_nan() -> None:
    rows = torch.zeros(20, 5)
    rows[:, 0] = 2000.0  # the others' probability is 0 in float64
    assert inception_score(rows).full == pytest.approx(1)


def test_order_does_not_matter_to_the_full_value_and_the_interval_holds_it() -> None:
    rows = logits(400, 10)
    result = inception_score(rows)
    assert inception_score(rows.flip(0)).full == pytest.approx(result.full, rel=1e-12)
    assert result.interval.low < result.full < result.interval.high


def test_mistakes_are_told() -> None:
    with refused("missing", "splits"):
        inception_score(torch.zeros(5, 3))
    with refused("not_finite", "logits"):
        inception_score(torch.full((20, 3), torch.nan))
