"""Moments: exact whatever the batches, mergeable, and clear about bad input."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from carrara.errors import UserError
from carrara.evaluation import Moments
from carrara.evaluation import moments as moments_module
from carrara.evaluation.moments import BLOCK


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


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 4000), max_size=5))
def test_processes_merge_to_one_stream(cuts: list[int]) -> None:
    x = torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5 + 100
    edges = [0, *sorted(cuts), 4000]
    total = Moments(6)
    for start, stop in itertools.pairwise(edges):
        total.merge(Moments(6).update(x[start:stop]) if stop > start else Moments(6))
    whole = Moments.of(x)
    assert total.count == 4000
    # Blocks lie elsewhere: rounding of float64 sums, no more.
    torch.testing.assert_close(total.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(total.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def share_of_a_process(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 10
    joined = Moments(6).update(x[rank::world]).over_processes()
    torch.save([joined.mean, joined.covariance, joined.count], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    start_processes(share_of_a_process, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 10
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2] == 500
    torch.testing.assert_close(first[1], Moments.of(x).covariance, rtol=1e-12, atol=1e-12)


def test_what_processes_exchange_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes in one: each one's state is noted, then all are handed to each."""
    x = torch.randn(3000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 10
    shares = [Moments(6).update(x[rank::3]) for rank in range(3)]
    states: list[Tensor] = []

    def note(state: Tensor) -> Tensor:
        states.append(state)
        return state

    monkeypatch.setattr(moments_module, "gather", note)
    for share in shares:
        share.over_processes()
    monkeypatch.setattr(moments_module, "gather", lambda state: torch.cat(states))
    joined = [share.over_processes() for share in shares]
    assert all(torch.equal(joined[0].covariance, other.covariance) for other in joined)
    assert joined[0].count == 3000
    torch.testing.assert_close(joined[0].covariance, Moments.of(x).covariance, rtol=1e-12, atol=1e-12)


def test_one_process_keeps_its_own() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Moments.of(x).over_processes().covariance, Moments.of(x).covariance)


def test_order_changes_rounding_only() -> None:
    x = torch.randn(3000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(Moments.of(x).covariance, Moments.of(x.flip(0)).covariance, rtol=1e-12, atol=1e-13)


def test_a_large_offset_costs_no_digits() -> None:
    """Sums of squares minus squares of sums would lose all digits of a covariance of 1e-8 beside a mean of 1e4."""
    x = 1e-4 * torch.randn(3000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    shifted = Moments.of(x + 1e4)
    # The rows themselves, rounded at 1e4, hold 1e-12 / 1e-4 = 1e-8 relative.
    torch.testing.assert_close(shifted.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-15)


def test_more_features_come_after_a_merge() -> None:
    x = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    moments = Moments(3).update(x[:200]).merge(Moments.of(x[200:300])).update(x[300:])
    torch.testing.assert_close(moments.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-13)


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
    with pytest.raises(UserError, match="at least one image"):
        Moments.of(torch.zeros(0, 3))
    with pytest.raises(UserError, match=r"shape \[12\]: give one row for each"):
        Moments.of(torch.zeros(12))  # features flattened by mistake once gave somebody a FID of 0
    with pytest.raises(UserError, match="at least 2 images"):
        Moments.of(torch.zeros(1, 3)).covariance
    with pytest.raises(UserError, match="dimension 4 cannot join moments of dimension 3"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(UserError, match="cannot be merged"):
        Moments(3).merge(Moments(4))


def test_a_refused_batch_leaves_the_moments_alone() -> None:
    moments = Moments.of(torch.ones(4, 2))
    with pytest.raises(UserError):
        moments.update(torch.full((2, 2), torch.nan))
    assert moments.count == 4
    assert torch.isfinite(moments.covariance).all()
