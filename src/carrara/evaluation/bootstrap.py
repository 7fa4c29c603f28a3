"""Confidence intervals by the bootstrap (Efron 1979).

The reference belongs to the protocol and is held fixed; what is resampled is the set over which a metric is
an average. Draws depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

CHUNK = 1 << 24


@dataclass(frozen=True)
class Interval:
    """Where a metric lies with the given confidence, for another draw of as many samples."""

    low: float
    high: float
    level: float = 0.95
    replicates: int = 0


def resamples(count: int, replicates: int, seed: int = 0) -> Iterator[Tensor]:
    """`replicates` draws of `count` row indices with replacement, int64 [count] each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(replicates):
        yield torch.randint(count, (count,), generator=generator)


def weights(count: int, replicates: int, seed: int = 0) -> Tensor:
    """How often each row is drawn in each replicate, float64 [replicates, count]."""
    return torch.stack(
        [torch.bincount(index, minlength=count) for index in resamples(count, replicates, seed)]
    ).double()


def percentile(replicates: Tensor, level: float = 0.95) -> Interval:
    """The central fraction `level` of the replicates [R]."""
    tail = (1 - level) / 2
    low, high = torch.quantile(replicates.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high, level, len(replicates))


def around(value: float, replicates: Tensor, level: float = 0.95) -> Interval:
    """The replicates' standard deviation around `value`: for metrics that resampling shifts (the Inception score).

    The normal approximation, value ± z·sd: steady with a few dozen replicates. Never below 0.
    """
    deviation = float(replicates.double().std())
    reach = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))) * deviation
    return Interval(max(0.0, value - reach), value + reach, level, len(replicates))


def mean_interval(values: Tensor, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> Interval:
    """The interval of the mean of one number for each sample, values [N]."""
    return interval(values, lambda drawn: drawn.mean(-1), level, replicates, seed)


def median_interval(values: Tensor, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> Interval:
    """The interval of the median of one number for each sample, values [N]."""
    return interval(values, lambda drawn: drawn.quantile(0.5, dim=-1), level, replicates, seed)


def interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of `statistic` ([R, N] -> [R]) of one number for each sample, values [N]."""
    values = values.double().cpu()
    together = max(1, CHUNK // len(values))
    drawn = resamples(len(values), replicates, seed)
    parts = []
    while batch := list(islice(drawn, together)):
        parts.append(statistic(values[torch.stack(batch)]))
    return percentile(torch.cat(parts), level)
