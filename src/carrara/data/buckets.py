"""Aspect-ratio buckets: a batch has pictures of similar shape, so that little is cut away."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from carrara.data.batches import in_threads
from carrara.data.decode import UnreadablePicture
from carrara.data.order import Integers, Selection, refuse_fewer_than, refuse_other_count, shuffled_index
from carrara.data.source import Source, counted
from carrara.errors import UserError

_BATCHES_STREAM = 4
_ROUND_EPOCHS = 8
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True, eq=False)
class AspectBuckets:
    """An order in which every global batch comes from one bucket, and is prepared to that bucket's size.

    The batches come in rounds of about eight epochs: in each round a bucket of n samples gives
    max(1, round(8·n / batch_size)) batches, at places that a permutation shuffles, and continues through its own
    permutations of its samples. All of it is a function of (seed, step).

    Attributes:
        sizes: height and width of each bucket.
        bucket: int64 [N], the bucket of each sample.
        batch_size: the global batch.
    """

    sizes: tuple[tuple[int, int], ...]
    bucket: Integers
    batch_size: int

    @cached_property
    def members(self) -> list[Integers]:
        """The samples of each bucket, ascending."""
        return [np.flatnonzero(self.bucket == b) for b in range(len(self.sizes))]

    @cached_property
    def round(self) -> Integers:
        """How many batches of a round each bucket gives."""
        counts = [round(_ROUND_EPOCHS * len(members) / self.batch_size) for members in self.members]
        return np.maximum(counts, 1)

    def select(self, seed: int, positions: Integers) -> Selection:
        step, offset = divmod(int(positions[0]), self.batch_size)
        ends = np.cumsum(self.round)
        slot = int(shuffled_index(seed, step, int(ends[-1]), _BATCHES_STREAM))
        bucket = int(np.searchsorted(ends, slot, side="right"))
        rounds_before = step // int(ends[-1])
        turn = rounds_before * int(self.round[bucket]) + slot - int(ends[bucket] - self.round[bucket])
        places = turn * self.batch_size + offset + np.arange(len(positions))
        members = self.members[bucket]
        return Selection(members[shuffled_index(seed, places, len(members))], members)

    @property
    def sentence(self) -> str:
        """The buckets and how many pictures each holds."""
        sizes = zip(self.sizes, self.members, strict=True)
        return (
            "aspect buckets: " + ", ".join(f"{h}×{w} ({counted(len(held), 'image')})" for (h, w), held in sizes) + "."
        )

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[self.bucket[index]]

    def check(self, count: int, batch_size: int) -> None:
        refuse_other_count(len(self.bucket), count)
        if batch_size != self.batch_size:
            raise UserError(
                f"buckets of batch {self.batch_size} cannot give batches of {batch_size}: make them for these.",
                key="training.batch_size",
                code="mismatch",
            )


def aspect_buckets(
    source: Source,
    resolution: tuple[int, int],
    batch_size: int,
    multiple: int = 8,
    largest_aspect: float = 2.0,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> AspectBuckets:
    """Sort the pictures of a source by shape.

    The buckets are the given `sizes`, else all with sides a multiple of `multiple` and an area that is
    as large as `resolution` allows, from 1:`largest_aspect` to `largest_aspect`:1. A picture goes where its aspect
    ratio is nearest on a logarithmic scale; a bucket with less than a batch is closed and its pictures go to the
    nearest that is left.

    Args:
        resolution: height and width whose area no bucket exceeds.
        batch_size: the global batch.
        multiple: what the network's levels (and a codec's) need of a side.
        sizes: height and width of each bucket.

    Raises:
        UserError: fewer pictures than a batch, no size fits, or `multiple` does not divide a given side.
    """
    sizes = _sizes(resolution, multiple, largest_aspect) if sizes is None else _given(sizes, multiple)
    refuse_fewer_than(batch_size, len(source), source.name)
    aspects = np.log([width / height for height, width in sizes])
    wanted = np.log(_aspect_ratios(source))
    open_buckets = np.arange(len(sizes))
    while True:
        nearest = np.abs(wanted[:, None] - aspects[open_buckets]).argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(open_buckets))
        if counts.min() >= batch_size:
            kept = tuple(sizes[b] for b in open_buckets)
            return AspectBuckets(kept, nearest.astype(np.int64), batch_size)
        open_buckets = np.delete(open_buckets, counts.argmin())


def _given(sizes: Sequence[tuple[int, int]], multiple: int) -> list[tuple[int, int]]:
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise UserError(
                f"the network halves images, so {multiple} must divide both sides of {height}×{width}.",
                key="data.buckets",
                code="shape",
            )
    return sorted(set(sizes))


def _sizes(resolution: tuple[int, int], multiple: int, largest_aspect: float) -> list[tuple[int, int]]:
    area = resolution[0] * resolution[1]
    sizes = set()
    for short in range(multiple, int(area**0.5) + 1, multiple):
        long = area // short // multiple * multiple
        if long <= largest_aspect * short:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise UserError(
            f"no size of {resolution[0]}×{resolution[1]} or less has sides that {multiple} divides.",
            key="data.resolution",
            code="shape",
        )
    return sorted(sizes)


def _aspect_ratios(source: Source) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Width / height of each picture once upright, from the headers alone; 1 where there is no reading it."""

    def one(index: int) -> float:
        try:
            with Image.open(io.BytesIO(source.pictures.read(index))) as image:
                ratio = image.width / image.height
                return 1 / ratio if image.getexif().get(0x0112) in _SIDEWAYS else ratio
        except (UnreadablePicture, OSError, SyntaxError, ValueError):
            return 1.0

    return np.fromiter(in_threads(source, one, range(len(source))), np.float64, len(source))
