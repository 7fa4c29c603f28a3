"""Which sample stands at global position p, and with which augmentation: functions of (seed, p) alone.

Nothing is stored and nothing is counted, so stopping, resuming, the number of processes and the number of
workers cannot change the order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from carrara.errors import UserError

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

DRAWS = 4
"""Uniform draws that belong to each position: crop top, crop left, flip, and the substitute for a bad file."""

_ROUNDS = 8
_ORDER, _AUGMENTATION = 1, 2  # the streams of one seed, as the high word of Philox's key


def shuffled_index(seed: int, positions: ArrayLike, count: int) -> Integers:
    """The index in 0..count-1 of the sample at each global position; each epoch is its own permutation.

    Position p lies in epoch p // count, and the `count` positions of an epoch visit every index once. The
    permutation is a Feistel network on pairs (left, right) of Z_m × Z_m, m = ⌈√count⌉, with addition mod m, walked
    until it lands below `count` (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", generalised
    Feistel and cycle-walking), so an epoch of a billion entries costs no memory.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        positions: int64, any shape, each at least 0.
        count: samples in the data set, at least 1.

    Returns:
        int64 of the shape of `positions`.

    Raises:
        UserError: a negative position or seed, or an empty data set.
    """
    where = np.asarray(positions, dtype=np.int64)
    if count < 1 or (where.size and int(where.min()) < 0):
        raise UserError(f"positions count from 0 in a data set of at least 1 sample, not {count}.")
    epoch, value = (part.astype(np.uint64).ravel() for part in np.divmod(where, count))
    # A floor of 8 keeps the group of permutations rich for a handful of samples; the walk there is still short.
    side = np.uint64(max(math.isqrt(count - 1) + 1, 8))
    keys = np.random.Philox(key=_key(seed, _ORDER)).random_raw(_ROUNDS)
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
    whatever slice it is asked for.
    """
    words = np.random.Philox(key=_key(seed, _AUGMENTATION), counter=start).random_raw(DRAWS * count)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(count, DRAWS)


def _key(seed: int, stream: int) -> int:
    """Philox's 128-bit key: the stream in the high word, the seed in the low one."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed must lie between 0 and 2**64 - 1, not {seed}.")
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
