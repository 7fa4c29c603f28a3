"""Order and augmentation are functions of (seed, position): permutations, uniform, reproducible."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from carrara.data import augmentation_draws, shuffled_index
from carrara.errors import UserError

SEEDS = st.integers(0, 2**64 - 1)


@given(seed=SEEDS, count=st.integers(1, 3000), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_every_sample_once(seed: int, count: int, epoch: int) -> None:
    index = shuffled_index(seed, np.arange(count) + epoch * count, count)
    assert np.array_equal(np.sort(index), np.arange(count))


@given(seed=SEEDS, count=st.integers(1, 10**9), positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_position_does_not_depend_on_its_neighbours(seed: int, count: int, positions: list[int]) -> None:
    together = shuffled_index(seed, positions, count)
    alone = [int(shuffled_index(seed, p, count)) for p in positions]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < count


def test_a_billion_samples_need_no_table() -> None:
    index = shuffled_index(3, np.arange(10**6), 10**9)
    assert len(np.unique(index)) == 10**6
    # A uniform sample: Kolmogorov-Smirnov; sampling without replacement is closer to uniform than the test needs.
    assert stats.kstest(index / 10**9, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("count", [3, 4])
def test_all_permutations_are_equally_frequent(count: int) -> None:
    epochs = 24_000
    orders = shuffled_index(5, np.arange(count * epochs), count).reshape(epochs, count)
    seen = Counter(map(tuple, orders.tolist()))
    expected = list(permutations(range(count)))
    # One fixed seed, so the outcome is fixed; 1e-4 is the level at which a fair shuffle would be rejected.
    assert stats.chisquare([seen[order] for order in expected]).pvalue > 1e-4


@pytest.mark.parametrize("count", [10, 97, 1000])
def test_places_and_neighbours_are_uniform(count: int) -> None:
    epochs = 200_000 // count
    orders = shuffled_index(11, np.arange(count * epochs), count).reshape(epochs, count)
    for place in (0, count // 2, count - 1):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=count)).pvalue > 1e-4
    gaps = (orders[:, 1:] - orders[:, :-1]) % count
    assert stats.chisquare(np.bincount(gaps.ravel(), minlength=count)[1:]).pvalue > 1e-4


def test_epochs_and_seeds_differ() -> None:
    count = 1000
    first, second = (shuffled_index(0, np.arange(count) + e * count, count) for e in (0, 1))
    other = shuffled_index(1, np.arange(count), count)
    # Two independent permutations share about 1 place (Poisson); 10 has probability 1e-7.
    assert (first == second).sum() < 10
    assert (first == other).sum() < 10


@settings(max_examples=30)
@given(seed=SEEDS, start=st.integers(0, 2**60), count=st.integers(1, 50), cut=st.integers(0, 49))
def test_draws_are_addressed_by_position(seed: int, start: int, count: int, cut: int) -> None:
    cut = min(cut, count - 1)
    whole = augmentation_draws(seed, start, count)
    part = augmentation_draws(seed, start + cut, count - cut)
    assert np.array_equal(whole[cut:], part)
    assert whole.min() >= 0
    assert whole.max() < 1


def test_draws_are_uniform_and_independent() -> None:
    draws = augmentation_draws(7, 0, 20_000)
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    # Sampling error of a correlation of n independent pairs is 1/sqrt(n) = 0.007; five of them.
    assert np.abs(correlation).max() < 5 / np.sqrt(len(draws))


@pytest.mark.parametrize(("seed", "position", "count"), [(-1, 0, 5), (2**64, 0, 5), (0, -1, 5), (0, 0, 0)])
def test_impossible_questions_are_refused(seed: int, position: int, count: int) -> None:
    with pytest.raises(UserError):
        shuffled_index(seed, position, count)
