"""Intervals: width as theory has it, coverage, determinism."""

from __future__ import annotations

import pytest
import torch

from carrara.evaluation import bootstrap


def test_a_mean_has_the_textbook_interval() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    interval = bootstrap.mean_interval(values)
    width = 2 * 1.96 * float(values.std()) / 2000**0.5
    # A quantile of 1,000 replicates is known to about 5 % of the deviation.
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)
    assert interval.low < float(values.mean()) < interval.high


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(200):
        values = (torch.rand(100, generator=torch.Generator().manual_seed(seed)) < 0.3).double()
        interval = bootstrap.mean_interval(values, replicates=300, seed=seed)
        held += interval.low <= 0.3 <= interval.high
    # 190 expected; 3 standard deviations of that count are 9, and the bootstrap is a little short at N = 100.
    assert held >= 178


def test_draws_depend_on_the_seed_alone_not_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = bootstrap.median_interval(values, seed=4)
    monkeypatch.setattr(bootstrap, "CHUNK", 130)
    assert bootstrap.median_interval(values, seed=4) == whole
    assert bootstrap.median_interval(values, seed=5) != whole


def test_weights_are_the_resamples_counted() -> None:
    weights = bootstrap.weights(30, 4, seed=2)
    for row, index in zip(weights, bootstrap.resamples(30, 4, seed=2), strict=True):
        assert torch.equal(row, torch.bincount(index, minlength=30).double())
    assert weights.sum(1).tolist() == [30] * 4
