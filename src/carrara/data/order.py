"""Which sample is at global position p, and with which augmentation: functions of (seed, p) alone.

Nothing is stored and nothing is counted, so stopping, resuming, the number of processes and the number of
workers cannot change the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from carrara.errors import UserError

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

DRAWS = 4
"""Uniform draws that belong to each position: crop top, crop left, flip, and the substitute for a bad file."""

_ROUNDS = 8
_SAMPLES, _AUGMENTATION, _GROUPS = 1, 2, 3  # the streams of one seed, as the high word of Philox's key


@dataclass(frozen=True)
class Selection:
    """The samples at some positions of one batch.

    Attributes:
        index: int64, one for each position.
        pool: the samples that may take the place of an unreadable one; None means all.
    """

    index: Integers
    pool: Integers | None = None


class Order(Protocol):
    """Which sample is where. Frozen: nothing is counted along the way."""

    def select(self, seed: int, positions: Integers) -> Selection:
        """The samples at positions that lie in one global batch."""
        ...

    def size(self, index: int) -> tuple[int, int] | None:
        """Height and width that a sample is prepared to, where the order decides that."""
        ...

    def check(self, count: int, batch_size: int) -> None:
        """Raises UserError unless a data set and a global batch are those that the order was made for."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every epoch a permutation of all `count` samples."""

    count: int

    def select(self, seed: int, positions: Integers) -> Selection:
        return Selection(shuffled_index(seed, positions, self.count))

    def size(self, index: int) -> None:
        return None

    def check(self, count: int, batch_size: int) -> None:
        refuse_other_count(self.count, count)


@dataclass(frozen=True)
class ShuffledShards:
    """Every epoch the shards in a permuted order, and the samples of `mixed` neighbouring shards permuted together.

    For sets on disks or networks where reading here and there is slow: at any time only `mixed` shards are
    read from. A larger number mixes better.

    Attributes:
        sizes: samples in each shard, in the order of the source.
        mixed: how many shards are read from at a time.
    """

    sizes: tuple[int, ...]
    mixed: int = 16

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.mixed < 1:
            raise UserError("shards are mixed at least one at a time, and each has at least one sample.", key="mixed")

    def select(self, seed: int, positions: Integers) -> Selection:
        epochs, places = np.divmod(positions, sum(self.sizes))
        index = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            order, ends = _shard_groups(self, seed, epoch)
            groups = np.searchsorted(ends, places, side="right")
            for group in np.unique(groups[epochs == epoch]).tolist():
                here = (epochs == epoch) & (groups == group)
                start = ends[group - 1] if group else 0
                shards = order[group * self.mixed : (group + 1) * self.mixed]
                index[here] = self._within(seed, epoch * len(ends) + group, places[here] - start, shards)
        return Selection(index)

    def _within(self, seed: int, turn: int, places: Integers, shards: Integers) -> Integers:
        """The samples at some places of a group of shards, shuffled again at each turn."""
        sizes = np.asarray(self.sizes)
        held = np.cumsum(sizes[shards])
        chosen = shuffled_index(seed, turn * held[-1] + places, int(held[-1]))
        shard = np.searchsorted(held, chosen, side="right")
        first = np.cumsum(sizes) - sizes
        result: Integers = first[shards[shard]] + chosen - (held - sizes[shards])[shard]
        return result

    def size(self, index: int) -> None:
        return None

    def check(self, count: int, batch_size: int) -> None:
        refuse_other_count(sum(self.sizes), count)


class Sampler:
    """Which samples one process sees at each step: its own slice of each global batch.

    Args:
        count: samples in the data set.
        name: of the data set, for messages.
        seed: of the order and the augmentation.
        batch_size: the global batch, over all processes.
        rank, world: this process and their number.
        order: which sample is at which position; None is `Shuffled`.

    Raises:
        UserError: fewer samples than a batch, a batch that the processes cannot divide, or an order of other data.
    """

    def __init__(
        self, count: int, name: str, seed: int, batch_size: int, rank: int, world: int, order: Order | None
    ) -> None:
        if batch_size < 1:
            raise UserError(f"a batch holds at least 1 image, not {batch_size}.", key="training.batch_size")
        refuse_fewer_than(batch_size, count, name)
        if batch_size % world or not 0 <= rank < world:
            raise UserError(
                f"a batch of {batch_size} cannot be divided among {world} processes: make it a multiple.",
                key="training.batch_size",
            )
        self.count, self.seed, self.batch_size, self.rank, self.world = count, seed, batch_size, rank, world
        self.order: Order = Shuffled(count) if order is None else order
        self.order.check(count, batch_size)

    def positions(self, step: int) -> Tensor:
        """The global positions of this process's slice of batch `step`: int64 [batch_size / world]."""
        own = self.batch_size // self.world
        start = step * self.batch_size + self.rank * own
        return torch.arange(start, start + own)

    def select(self, step: int) -> list[tuple[int, Iterator[int], list[float]]]:
        """For each position of the slice: its sample, those that may replace it in turn, and its draws."""
        positions = self.positions(step).numpy()
        selection = self.order.select(self.seed, positions)
        draws = augmentation_draws(self.seed, int(positions[0]), len(positions)).tolist()
        pool = selection.pool
        return [
            (index, self._replacements(pool, draw[3]), draw)
            for index, draw in zip(selection.index.tolist(), draws, strict=True)
        ]

    def _replacements(self, pool: Integers | None, draw: float) -> Iterator[int]:
        """All samples of the pool, from a drawn place on."""
        count = self.count if pool is None else len(pool)
        for attempt in range(count):
            place = (int(draw * count) + attempt) % count
            yield place if pool is None else int(pool[place])


def refuse_fewer_than(batch_size: int, count: int, name: str) -> None:
    """Raises UserError unless a data set of `count` images fills one batch."""
    if count < batch_size:
        raise UserError(
            f"{name} holds {count} image{'s' * (count != 1)}, fewer than one batch of {batch_size}: "
            f"set training.batch_size to {count} or less, or add images.",
            key="training.batch_size",
            code="missing",
        )


def refuse_other_count(expected: int, count: int) -> None:
    """Raises UserError unless an order of `expected` samples is of a data set of `count`."""
    if expected != count:
        raise UserError(
            f"an order of {expected} images does not fit a data set of {count}: make it from this one.",
            key="order",
            code="mismatch",
        )


@lru_cache(maxsize=4)
def _shard_groups(order: ShuffledShards, seed: int, epoch: int) -> tuple[Integers, Integers]:
    """The shards in the epoch's order, and where in the epoch each group of them ends."""
    count = len(order.sizes)
    shards = shuffled_index(seed, epoch * count + np.arange(count), count, _GROUPS)
    starts = np.arange(0, count, order.mixed)
    return shards, np.cumsum(np.add.reduceat(np.asarray(order.sizes)[shards], starts))


def shuffled_index(seed: int, positions: ArrayLike, count: int, stream: int = _SAMPLES) -> Integers:
    """The index in 0..count-1 of the sample at each global position; each epoch is its own permutation.

    Position p lies in epoch p // count, and the `count` positions of an epoch visit every index once. The
    permutation is a Feistel network on pairs (left, right) of Z_m × Z_m, m = ⌈√count⌉, with addition mod m,
    applied until the result is below `count` (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains",
    generalised Feistel and cycle-walking), so an epoch of a billion entries costs no memory.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        positions: int64, any shape, each at least 0.
        count: samples in the data set, at least 1.
        stream: one seed holds independent orders, one a stream.

    Returns:
        int64 of the shape of `positions`.

    Raises:
        UserError: a negative position or seed, or an empty data set.
    """
    where = np.asarray(positions, dtype=np.int64)
    if count < 1 or (where.size and int(where.min()) < 0):
        raise UserError(f"positions count from 0 in a data set of at least 1 sample, not {count}.", key="positions")
    epoch, value = (part.astype(np.uint64).ravel() for part in np.divmod(where, count))
    # A floor of 8 keeps the group of permutations rich for a handful of samples; few more rounds follow.
    side = np.uint64(max(math.isqrt(count - 1) + 1, 8))
    keys = np.random.Philox(key=_key(seed, stream)).random_raw(_ROUNDS)
    tweaks = [_mix(epoch + key) for key in keys]
    value = _feistel(value, side, tweaks)
    outside = np.flatnonzero(value >= count)
    while outside.size:
        value[outside] = _feistel(value[outside], side, [tweak[outside] for tweak in tweaks])
        outside = outside[value[outside] >= count]
    return value.astype(np.int64).reshape(where.shape)


def augmentation_draws(seed: int, start: int, count: int) -> NDArray[np.float64]:
    """`DRAWS` uniform draws in [0, 1) for each of the positions start..start+count-1: float64 [count, DRAWS].

    One position is one counter of the Philox4x64 generator (Salmon et al. 2011), so row p is the same in
    whatever slice it is in.
    """
    words = np.random.Philox(key=_key(seed, _AUGMENTATION), counter=start).random_raw(DRAWS * count)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(count, DRAWS)


def _key(seed: int, stream: int) -> int:
    """Philox's 128-bit key: the stream in the high word, the seed in the low one."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed must be between 0 and 2**64 - 1, not {seed}.", key="seed")
    return (stream << 64) | seed


def _feistel(value: Words, side: np.uint64, tweaks: list[Words]) -> Words:
    """One pass of the network: a permutation of 0..side²-1 for each column of tweaks."""
    left, right = value // side, value % side
    for tweak in tweaks:
        left, right = right, (left + _mix(right ^ tweak) % side) % side
    return left * side + right


def _mix(word: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words, wrapping on purpose."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
