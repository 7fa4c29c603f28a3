"""Randomness addressed by (seed, sample, draw), so that a picture does not depend on its batch.

Underneath lies numpy's Philox, a counter-based generator (Salmon et al. 2011): the key is (seed, draw), the
counter is the sample's place and size. Nothing is consumed and nothing remembered: the same address gives the same
numbers alone, in a batch of 64, on eight processes, and in a run that was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from carrara.devices import to_device
from carrara.errors import UserError, whole_number

_NUMBERS_PER_BLOCK = 8  # one Philox block gives four 64-bit words: eight numbers of 32 bits
_SUBDRAWS = 16  # a solver may draw this many times within one step
_CHUNK = 2**15  # pairs of normals made at a time: the working set stays in the processor's cache


def _per_row(count: int) -> int:
    """How many 32-bit numbers a row of `count` owns: whole blocks of the counter."""
    return -(-count // _NUMBERS_PER_BLOCK) * _NUMBERS_PER_BLOCK


def _generator(seed: int, draw: int, first_row: int, count: int) -> np.random.Philox:
    """The generator at the place of one row. Samples of other sizes have counters of their own."""
    place = first_row * (_per_row(count) // _NUMBERS_PER_BLOCK)
    # As unsigned arrays: numpy would read a list of small and huge numbers as floating point.
    counter = np.array([place & 0xFFFFFFFFFFFFFFFF, place >> 64, count, 0], dtype=np.uint64)
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, draw], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key)


def _bits(generator: np.random.Philox, rows: int, count: int) -> np.ndarray:
    """uint32 [rows, _per_row(count)] for consecutive rows."""
    words = generator.random_raw(rows * _per_row(count) // 2)
    return words.view(np.uint32).reshape(rows, -1)


def _box_muller(generator: np.random.Philox, out: Tensor, count: int) -> None:
    """Fill `out` [rows, _per_row(count)] with standard normals (Box & Muller 1958).

    Logarithm and cosine are taken in float64 and rounded to out's type, where square root and product are exactly
    rounded anyway: other processors and libraries see the same float32 picture but for rare last bits. The sine is
    ±√(1 - cos²), a third cheaper than asking for it. Rows are whole blocks and every operation runs over contiguous
    memory, so a number's neighbours in memory never matter to it.
    """
    pairs = _per_row(count) // 2
    step = max(1, min(_CHUNK // pairs, len(out)))
    wide = torch.empty(2, step, pairs, dtype=torch.float64)
    narrow = torch.empty(3, step, pairs, dtype=out.dtype)
    for first in range(0, len(out), step):
        rows = min(step, len(out) - first)
        bits = _bits(generator, rows, count)
        uniform, angle = wide[:, :rows]
        radius, cosine, sine = narrow[:, :rows]
        np.add(bits[:, :pairs], 0.5, out=uniform.numpy(), dtype=np.float64)
        torch.mul(uniform.mul_(2.0**-32).log_(), -2, out=radius)
        radius.sqrt_()
        # Signed bits give angles in [-π, π), whose sign is that of their sine.
        np.multiply(bits[:, pairs:].view(np.int32), 2.0**-31 * math.pi, out=angle.numpy(), dtype=np.float64)
        sine.copy_(angle)
        cosine.copy_(angle.cos_())
        squares = uniform.fill_(1).addcmul_(angle, angle, value=-1)
        torch.copysign(radius, sine, out=sine)
        target = out[first : first + rows]
        torch.mul(radius, cosine, out=target[:, :pairs])
        torch.mul(sine, radius.copy_(squares).sqrt_(), out=target[:, pairs:])


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
        seed: a whole number of at most 64 bits, signed or not.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number(self.seed, "seed"))
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"a seed is a whole number of 64 bits, {self.seed} is not.", key="seed")

    def rows(self, ids: Sequence[int] | Tensor | range) -> Noise:
        """The noise of other samples: a shard of a batch, or one picture of it.

        Raises:
            UserError: a negative sample number.
        """
        numbers = tuple(int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids))
        if numbers and min(numbers) < 0:
            raise UserError(f"sample numbers start at 0: there is no noise for sample {min(numbers)}.", key="ids")
        toward = (self.toward[0].rows(numbers), self.toward[1]) if self.toward else None
        return replace(self, ids=numbers, toward=toward)

    def at(self, draw: int) -> Noise:
        """Another draw of the same samples."""
        if draw < 0:
            raise UserError(f"draws start at 0: there is no draw {draw}.", key="draw")
        return replace(self, draw=draw, toward=(self.toward[0].at(draw), self.toward[1]) if self.toward else None)

    def slerp(self, other: Noise, weight: float) -> Noise:
        """Normals on the great circle between this noise (weight 0) and another seed's (weight 1).

        A small weight toward a sub-seed varies a picture a little. Uniform numbers stay this noise's own.
        """
        if not 0 <= weight <= 1:
            raise UserError(f"a slerp weight lies in 0..1, {weight:g} does not.", key="weight")
        if weight == 0:
            return self
        return replace(self, toward=(replace(other, ids=self.ids, draw=self.draw), weight))

    def _runs(self, rows: int, count: int, sub: int) -> list[tuple[int, int, np.random.Philox]]:
        """Stretches of consecutive samples: (place in the batch, length, generator)."""
        if self.ids is not None and len(self.ids) != rows:
            raise UserError(
                f"the noise is bound to {len(self.ids)} samples, not to a batch of {rows}.", key="noise", code="shape"
            )
        if not 0 <= sub < _SUBDRAWS:
            raise UserError(f"a step may draw {_SUBDRAWS} times: there is no draw number {sub}.", key="sub")
        if rows == 0 or count == 0:
            return []
        key = self.draw * _SUBDRAWS + sub
        runs, place = [], 0
        for first, length in [(0, rows)] if self.ids is None else _runs(self.ids):
            runs.append((place, length, _generator(self.seed, key, first, count)))
            place += length
        return runs

    def uniform(
        self,
        shape: Sequence[int],
        sub: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Numbers in the open interval (0, 1) on a lattice of 2³², of `shape` [B] or [B, …].

        Args:
            sub: several draws within one step have different numbers, 0..15.
        """
        count = math.prod(shape[1:])
        values = np.empty((shape[0], count))
        for place, length, generator in self._runs(shape[0], count, sub):
            np.add(_bits(generator, length, count)[:, :count], 0.5, out=values[place : place + length])
        return to_device(torch.from_numpy(values * 2.0**-32).reshape(tuple(shape)), device, dtype)

    def normal(
        self,
        shape: Sequence[int],
        sub: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers of `shape` [B, …].

        They are made on the CPU and then moved, so that every device sees the same noise; float32 and float64
        differ by their rounding only, narrower types are rounded from float32.
        """
        if self.toward is None:
            own = self._own(shape, sub, torch.float64 if dtype == torch.float64 else torch.float32)
            return to_device(own, device, dtype)
        other, weight = self.toward
        if weight == 1:
            return other.normal(shape, sub, dtype, device)
        theirs = other.normal(shape, sub, torch.float64)
        return to_device(slerp(self._own(shape, sub, torch.float64), theirs, weight), device, dtype)

    def _own(self, shape: Sequence[int], sub: int, dtype: torch.dtype) -> Tensor:
        """Standard normals of this seed alone, in float32 or float64."""
        count = math.prod(shape[1:])
        values = torch.empty(shape[0], _per_row(count), dtype=dtype)
        for place, length, generator in self._runs(shape[0], count, sub):
            _box_muller(generator, values[place : place + length], count)
        return values[:, :count].reshape(tuple(shape))

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
            raise UserError(
                f"no noise was given for draw {self.draw}, number {sub} within it.", key="tensors", code="missing"
            )
        value = self.tensors[self.draw]
        if self.ids is not None:
            value = value[list(self.ids)]
        if tuple(value.shape) != tuple(shape):
            raise UserError(
                f"the given noise has the shape {tuple(value.shape)}, not {tuple(shape)}.", key="tensors", code="shape"
            )
        return value.to(device=device, dtype=dtype)


def slerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of every sample, [B, …] (Shoemake 1985); straight where the two are parallel.

    The angle is taken in float64 with sums that do not depend on the batch.
    """
    flat = (len(start), math.prod(start.shape[1:]))
    a, b = (value.detach().reshape(flat).double().cpu().numpy() for value in (start, end))
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    angle = np.arccos(np.clip(cosine, -1, 1))
    parallel = np.sin(angle) < 1e-6
    sine = np.where(parallel, 1.0, np.sin(angle))
    shape = (-1, *[1] * (start.ndim - 1))
    shares = (np.sin((1 - weight) * angle) / sine, np.sin(weight * angle) / sine)
    ours, theirs = (
        torch.from_numpy(np.where(parallel, straight, share)).to(start).reshape(shape)
        for straight, share in zip((1 - weight, weight), shares, strict=True)
    )
    return ours * start + theirs * end
