"""Batches by global position: the same samples however many processes and workers make them."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carrara.data.decode import UnreadablePicture
from carrara.data.order import Integers, Order, Shuffled, augmentation_draws
from carrara.data.preprocess import Preprocess
from carrara.data.source import Source
from carrara.data.workers import in_order
from carrara.errors import UserError

_THREADED_BYTES = 4096
_CHUNK = 1024

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step.

    Attributes:
        images: float32 [B, C, H, W] in [-1, 1].
        label: int64 [B] or None.
        captions: B texts or None.
        positions: int64 [B], the global positions.
        names: what messages call the pictures.
    """

    images: Tensor
    label: Tensor | None
    captions: list[str] | None
    positions: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class _Rows:
    """A batch before the main process has seen it: uint8 pixels travel four times lighter than floats."""

    pixels: NDArray[np.uint8]
    index: list[int]
    captions: list[str] | None = None
    unreadable: dict[int, str] = field(default_factory=dict)
    conversions: Counter[str] = field(default_factory=Counter)


class _Prepared(Protocol):
    def __getitem__(self, index: int) -> Tensor: ...


class Batches:
    """An endless sequence of batches; batch `step` holds positions step·batch_size onwards.

    The sample at global position p is the order's (`shuffled_index(seed, p, len(source))` unless another is
    given), and its augmentation comes from `augmentation_draws(seed, p)`. A picture that cannot be read is named
    in `source.unreadable` and replaced by one drawn for that position; too many of them stop the run.

    Args:
        source: the pictures.
        prepare: what is done to them.
        seed: of order and augmentation.
        batch_size: the global batch, over all processes.
        rank, world: this process and their number; it takes its own slice of each global batch.
        workers: processes that decode ahead; 0 decodes in this one. Not used where the cache holds everything.
        cache_bytes: a data set whose encoded and whose prepared pictures both fit is decoded once, here, and
            kept as uint8.
        progress: told (pictures decoded, pictures in all) while the cache fills.
        order: which sample stands where; None is `Shuffled`. `AspectBuckets` gives each batch its own height and
            width, `ShuffledShards` reads a few shards at a time.

    Raises:
        UserError: fewer pictures than a batch, a batch that the processes cannot share, or too many unreadable.
    """

    def __init__(
        self,
        source: Source,
        prepare: Preprocess,
        seed: int = 0,
        batch_size: int = 64,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        cache_bytes: int = 2**29,
        progress: Callable[[int, int], None] | None = None,
        order: Order | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"a batch holds at least 1 image (not {batch_size}), workers are 0 or more ({workers}).")
        source.refuse_fewer_than(batch_size)
        if batch_size % world or not 0 <= rank < world:
            raise UserError(f"a batch of {batch_size} cannot be shared by {world} processes: make it a multiple.")
        self.source = source
        self.prepare = prepare
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.workers = workers
        self.order: Order = Shuffled(len(source)) if order is None else order
        self.order.check(len(source), batch_size)
        self._cache: _Prepared | None = None
        self._cannot: dict[int, str] = {}  # pictures that are missing from the cache, with the reason
        if _fits(source, prepare, cache_bytes):
            self._cache, self._cannot = self._decode_all(progress)
            source.unreadable.update(self._cannot)
            source.refuse_unreadable()

    @property
    def cached(self) -> bool:
        """Whether all pictures are kept decoded in memory."""
        return self._cache is not None

    def positions(self, step: int) -> Tensor:
        """The global positions of this process's part of batch `step`: int64 [batch_size / world]."""
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return torch.arange(start, start + share)

    def at(self, step: int) -> Batch:
        """This process's part of batch `step`, made here: a function of (seed, step) alone.

        Raises:
            UserError: too many pictures are unreadable, or a shard is gone.
        """
        return self._finish(step, self._rows(step))

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, without end, the same as `at` gives, decoded ahead by the workers."""
        if self._cache is not None or self.workers == 0:
            yield from map(self.at, itertools.count(start_step))
        # Closed here and now on an error, whose traceback would keep the workers alive.
        with contextlib.closing(in_order(self._safe_rows, start_step, self.workers)) as ahead:
            yield from map(self._finish, itertools.count(start_step), ahead)

    def _safe_rows(self, step: int) -> _Rows | UserError:
        """What a worker makes; a mistake is handed over, so that it is raised without the worker's traceback."""
        try:
            return self._rows(step)
        except UserError as error:
            return error

    def _rows(self, step: int) -> _Rows:
        positions = self.positions(step).numpy()
        selection = self.order.select(self.seed, positions)
        draws = augmentation_draws(self.seed, int(positions[0]), len(positions))
        prepare = self._preparation(int(selection.index[0]))
        rows = _Rows(np.empty((len(positions), prepare.channels, prepare.height, prepare.width), np.uint8), [])
        for pixels, index, draw in zip(rows.pixels, selection.index.tolist(), draws.tolist(), strict=True):
            found, picture = self._readable(index, selection.pool, draw, rows)
            rows.index.append(found)
            pixels[:] = prepare.cut(picture, draw).numpy()
        captions = self.source.captions
        rows.captions = None if captions is None else [captions[i] for i in rows.index]
        return rows

    def _preparation(self, index: int) -> Preprocess:
        size = self.order.size(index)
        return self.prepare if size is None else replace(self.prepare, height=size[0], width=size[1])

    def _readable(self, index: int, pool: Integers | None, draw: list[float], rows: _Rows) -> tuple[int, Tensor]:
        """The picture at `index`; where it cannot be read, the next readable one from a drawn place of the pool."""
        count = len(self.source) if pool is None else len(pool)
        for attempt in range(count + 1):
            if attempt:
                index = (int(draw[3] * count) + attempt - 1) % count
                index = index if pool is None else int(pool[index])
            try:
                return index, self._picture(index, rows)
            except UnreadablePicture as error:
                rows.unreadable[index] = str(error)
        raise UserError(f"none of the {count} images in {self.source.name} can be read.")

    def _picture(self, index: int, rows: _Rows) -> Tensor:
        if self._cache is not None:
            if index in self._cannot:
                raise UnreadablePicture(self._cannot[index])
            return self._cache[index]
        image, notes = self.source.decode(index)
        rows.conversions.update(notes)
        return self._preparation(index).resized(image)

    def _decode_all(self, progress: Callable[[int, int], None] | None) -> tuple[_Prepared, dict[int, str]]:
        """Every picture, prepared as far as no draw decides, and why some are left out."""
        source, count = self.source, len(self.source)

        def one(index: int) -> tuple[Tensor | None, tuple[str, ...], str]:
            try:
                image, notes = source.decode(index)
            except UnreadablePicture as error:
                return None, (), str(error)
            return self._preparation(index).resized(image), notes, ""

        # One tensor for all is lighter than a tensor for each, where all are of one size.
        shape = (count, self.prepare.channels, self.prepare.height, self.prepare.width)
        one_size = self.prepare.crop == "center" and self.order.size(0) is None
        kept: dict[int, Tensor] | Tensor = torch.empty(shape, dtype=torch.uint8) if one_size else {}
        unreadable: dict[int, str] = {}
        for index, (pixels, notes, reason) in enumerate(in_threads(source, one, range(count))):
            source.conversions.update(notes)
            if pixels is None:
                unreadable[index] = reason
            else:
                kept[index] = pixels
            if progress is not None and (index % 256 == 255 or index + 1 == count):
                progress(index + 1, count)
        return kept, unreadable

    def _finish(self, step: int, rows: _Rows | UserError) -> Batch:
        if isinstance(rows, UserError):
            raise rows
        source = self.source
        source.unreadable.update(rows.unreadable)
        source.conversions.update(rows.conversions)
        source.refuse_unreadable()
        return Batch(
            images=normalised(rows.pixels, source.levels),
            label=None if source.labels is None else torch.from_numpy(source.labels[rows.index]),
            captions=rows.captions,
            positions=self.positions(step),
            names=[source.pictures.name(i) for i in rows.index],
        )


def normalised(pixels: NDArray[np.uint8], levels: int) -> Tensor:
    """Pixels of 0..levels-1 as float32 in [-1, 1], of the same shape (what lies above is cut, in place)."""
    if levels < 256:
        pixels.clip(max=levels - 1, out=pixels)  # bicubic may overshoot the white of the digits
    return torch.from_numpy(pixels).to(torch.float32).mul_(2 / (levels - 1)).sub_(1)


def _fits(source: Source, prepare: Preprocess, cache_bytes: int) -> bool:
    # A random crop keeps the whole resized picture; a ratio of 2:1 is a fair guess before any is seen.
    margin = 1 if prepare.crop == "center" else 2
    prepared = len(source) * prepare.channels * prepare.height * prepare.width * margin
    return prepared <= cache_bytes and source.pictures.encoded_bytes <= cache_bytes


def in_threads(source: Source, work: Callable[[int], Result], indices: Sequence[int]) -> Iterator[Result]:
    """`work` on each picture, results in order; in threads where decoding is what takes the time.

    Decoders let go of the interpreter, but tiny pictures keep the interpreter busy instead, and threads would
    only get in each other's way.
    """
    if source.pictures.encoded_bytes <= _THREADED_BYTES * len(source):
        yield from map(work, indices)
        return
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), _CHUNK):  # `map` would hold every result of a slow consumer
            yield from pool.map(work, indices[start : start + _CHUNK])
