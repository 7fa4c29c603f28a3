"""Moments: exact whatever the batches, and clear about bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation import Moments
from carrara.evaluation.moments import BLOCK
from tests.errors import refused


def stream(features: Tensor, sizes: list[int]) -> Moments:
    """The moments of the features, fed in batches whose sizes repeat."""
    moments, start, turn = Moments(features.shape[1]), 0, 0
    while start < len(features):
        moments.update(features[start : start + sizes[turn % len(sizes)]])
        start, turn = start + sizes[turn % len(sizes)], turn + 1
    return moments


def test_mean_and_covariance_are_the_usual_ones() -> None:
    x = torch.randn(3000, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments.of(x)
    # float64 sums of 3,000 terms of size 10: a few units in the 15th digit.
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    assert moments.count == 3000
    assert torch.equal(moments.covariance, moments.covariance.T)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 2 * BLOCK), min_size=1, max_size=5), n=st.integers(2, 2 * BLOCK + 7))
def test_batches_do_not_change_a_bit(sizes: list[int], n: int) -> None:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    whole, parts = Moments.of(x), stream(x, sizes)
    assert torch.equal(whole.mean, parts.mean)
    assert torch.equal(whole.covariance, parts.covariance)


def test_reading_in_the_middle_changes_nothing() -> None:
    x = torch.randn(2 * BLOCK, 4, generator=torch.Generator().manual_seed(0))
    watched = Moments(4)
    for batch in x.split(100):
        watched.update(batch)
        if watched.count > 1:
            assert len(watched.covariance) == len(watched.mean) == 4
    assert torch.equal(watched.covariance, Moments.of(x).covariance)


def test_order_changes_rounding_only() -> None:
    x = torch.randn(3000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(Moments.of(x).covariance, Moments.of(x.flip(0)).covariance, rtol=1e-12, atol=1e-13)


def test_a_large_offset_costs_no_digits() -> None:
    """Sums of squares minus squares of sums would lose all digits of a covariance of 1e-8 beside a mean of 1e4."""
    x = 1e-4 * torch.randn(3000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    shifted = Moments.of(x + 1e4)
    # The rows themselves, rounded at 1e4, hold 1e-12 / 1e-4 = 1e-8 relative.
    torch.testing.assert_close(shifted.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-15)


def test_images_are_flattened_and_numpy_is_welcome() -> None:
    x = torch.randn(10, 3, 4, 4)
    assert torch.equal(Moments.of(x).mean, Moments.of(x.flatten(1).numpy()).mean)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_are_named_by_row(bad: float) -> None:
    x = torch.zeros(5, 3)
    x[3, 1] = bad
    with pytest.raises(UserError, match="first in row 3"):
        Moments.of(x)


def test_infinities_that_cancel_are_still_seen() -> None:
    x = torch.zeros(5, 3)
    x[1, 0], x[2, 0] = torch.inf, -torch.inf
    with pytest.raises(UserError, match="first in row 1"):
        Moments.of(x)


def test_mistakes_are_told() -> None:
    with refused("shape", "features"):
        Moments.of(torch.zeros(0, 3))
    with refused("shape", "features"):
        Moments.of(torch.zeros(12))  # features flattened by mistake once gave somebody a FID of 0
    with refused("missing", "n"):
        Moments.of(torch.zeros(1, 3)).covariance
    with refused("shape", "features"):
        Moments(3).update(torch.zeros(2, 4))


def test_a_refused_batch_leaves_the_moments_alone() -> None:
    moments = Moments.of(torch.ones(4, 2))
    with pytest.raises(UserError):
        moments.update(torch.full((2, 2), torch.nan))
    assert moments.count == 4
    assert torch.isfinite(moments.covariance).all()
