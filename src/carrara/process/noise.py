"""Randomness addressed by (seed, sample, draw), so that a picture does not depend on its company.

Underneath lies numpy's Philox, a counter-based generator (Salmon et al. 2011): the key is (seed, draw), the
counter is the sample's place. Nothing is consumed and nothing remembered: the same address gives the same
numbers alone, in a batch of 64, on eight processes, and in a run that was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from carrara.errors import UserError

_WORDS_PER_BLOCK = 8  # one Philox block gives four 64-bit words: eight numbers of 32 bits
_SUBDRAWS = 16  # a solver may draw this many times within one step


def _words(seed: int, draw: int, first_row: int, rows: int, count: int) -> np.ndarray:
    """uint32 [rows, count] for consecutive rows; every row owns whole blocks of the counter."""
    blocks = -(-count // _WORDS_PER_BLOCK)
    place = first_row * blocks
    counter = [place & 0xFFFFFFFFFFFFFFFF, place >> 64, 0, 0]
    generator = np.random.Philox(counter=counter, key=[seed & 0xFFFFFFFFFFFFFFFF, draw])
    raw = generator.random_raw(rows * blocks * 4)
    return raw.view(np.uint32).reshape(rows, -1)[:, :count]


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive stretches (first, length) of a list of row numbers."""
    numbers = np.asarray(rows, dtype=np.int64)
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [len(numbers)]]))
    return [(int(numbers[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


@dataclass(frozen=True)
class Noise:
    """Random numbers by address.

    Attributes:
        seed: any integer of 64 bits.
        ids: the sample numbers of the batch's rows; None means 0..B-1. Set by `rows`.
        draw: which draw of the sample: 0 is a sampler's starting noise, i + 1 its step i. Set by `at`.
        toward: another noise and a weight in [0, 1]; normals are interpolated spherically. Set by `slerp`.

    Example:
        >>> noise = Noise(seed=7)
        >>> alone = noise.rows([3]).normal((1, 3, 8, 8))
        >>> torch.equal(alone[0], noise.normal((64, 3, 8, 8))[3])
        True
    """

    seed: int = 0
    ids: tuple[int, ...] | None = None
    draw: int = 0
    toward: tuple[Noise, float] | None = None

    def rows(self, ids: Sequence[int] | Tensor | range) -> Noise:
        """The noise of other samples: a shard of a batch, or one picture of it.

        Raises:
            UserError: a negative sample number.
        """
        numbers = tuple(int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids))
        if numbers and min(numbers) < 0:
            raise UserError(f"sample numbers start at 0: there is no noise for sample {min(numbers)}.")
        toward = (self.toward[0].rows(numbers), self.toward[1]) if self.toward else None
        return replace(self, ids=numbers, toward=toward)

    def at(self, draw: int) -> Noise:
        """Another draw of the same samples."""
        if draw < 0:
            raise UserError(f"draws start at 0: there is no draw {draw}.")
        return replace(self, draw=draw, toward=(self.toward[0].at(draw), self.toward[1]) if self.toward else None)

    def slerp(self, other: Noise, weight: float) -> Noise:
        """Normals on the great circle between this noise (weight 0) and another seed's (weight 1).

        A small weight toward a sub-seed varies a picture a little. Uniform numbers stay this noise's own.
        """
        if not 0 <= weight <= 1:
            raise UserError(f"a slerp weight lies in 0..1, {weight:g} does not.")
        return replace(self, toward=(replace(other, ids=self.ids, draw=self.draw), weight))

    def _bits(self, rows: int, count: int, sub: int) -> np.ndarray:
        ids = range(rows) if self.ids is None else self.ids
        if len(ids) != rows:
            raise UserError(f"the noise is bound to {len(ids)} samples, a batch of {rows} was asked for.")
        if not 0 <= sub < _SUBDRAWS:
            raise UserError(f"a step may draw {_SUBDRAWS} times, draw number {sub} was asked for.")
        key = self.draw * _SUBDRAWS + sub
        if rows == 0:
            return np.empty((0, count), dtype=np.uint32)
        runs = [(0, rows)] if self.ids is None else _runs(self.ids)
        parts = [_words(self.seed, key, first, length, count) for first, length in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def uniform(
        self,
        shape: Sequence[int],
        sub: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Numbers in the open interval (0, 1) on a lattice of 2³², of `shape` [B, …].

        Args:
            sub: several draws within one step are told apart by this number, 0..15.
        """
        count = math.prod(shape[1:])
        values = (self._bits(shape[0], count, sub).astype(np.float64) + 0.5) * 2.0**-32
        return torch.from_numpy(values).reshape(tuple(shape)).to(device=device, dtype=dtype)

    def normal(
        self,
        shape: Sequence[int],
        sub: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers of `shape` [B, …] by the Box-Muller transform.

        They are computed in float64 on the CPU and then rounded and moved, so that every device and type
        sees the same noise.
        """
        count = math.prod(shape[1:])
        pairs = -(-count // 2)
        bits = self._bits(shape[0], 2 * pairs, sub)
        uniform = torch.from_numpy(bits.astype(np.float64))
        radius = uniform[:, :pairs].add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = uniform[:, pairs:].mul_(2.0**-31 * math.pi)
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
        own = values.reshape(tuple(shape)).to(device=device, dtype=dtype)
        if self.toward is None:
            return own
        other, weight = self.toward
        return slerp(own, other.normal(shape, sub, dtype, device), weight)

    def like(self, x: Tensor, sub: int = 0) -> Tensor:
        """Standard normal numbers of x's shape, type and device."""
        return self.normal(x.shape, sub, x.dtype, x.device)


@dataclass(frozen=True)
class GivenNoise(Noise):
    """Noise read from a list instead of a generator: `tensors[d]` is draw d, [B, …].

    For replaying what another program drew. Draw 0 is the starting noise, i + 1 belongs to step i.
    """

    tensors: tuple[Tensor, ...] = ()

    def normal(
        self,
        shape: Sequence[int],
        sub: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        if sub or self.draw >= len(self.tensors):
            raise UserError(f"no noise was given for draw {self.draw}, number {sub} within it.")
        value = self.tensors[self.draw]
        if self.ids is not None:
            value = value[list(self.ids)]
        if tuple(value.shape) != tuple(shape):
            raise UserError(f"the given noise has the shape {tuple(value.shape)}, {tuple(shape)} was asked for.")
        return value.to(device=device, dtype=dtype)


def slerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of every sample, [B, …] (Shoemake 1985); straight where the two are parallel."""
    a, b = start.flatten(1), end.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (start.ndim - 1))
    sine = angle.sin()
    straight = torch.lerp(start, end, weight)
    curved = (((1 - weight) * angle).sin() * start + (weight * angle).sin() * end) / sine
    return torch.where(sine.abs() < 1e-6, straight, curved)
