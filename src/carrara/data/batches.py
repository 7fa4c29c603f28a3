"""Batches by global position: the same samples however many processes and workers make them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carrara.data.decode import UnreadablePicture
from carrara.data.order import Order, Sampler
from carrara.data.preprocess import Preprocess
from carrara.data.source import Source
from carrara.data.workers import in_order
from carrara.errors import UserError

Cache = Literal["auto", "memory", "none"]

_AUTO_BYTES = 2**29
_THREADED_BYTES = 4096
_CHUNK = 1024

Result = TypeVar("Result")
Movable = TypeVar("Movable", bound="_Movable")


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step.

    Attributes:
        pixels: uint8 [B, C, H, W], a quarter of the bytes of floats on the way to a device.
        num_values: a channel's values are 0..num_values-1.
        label: int64 [B] or None.
        captions: B texts or None.
        positions: int64 [B], the global positions.
        names: what messages call the pictures.
    """

    pixels: Tensor
    num_values: int
    label: Tensor | None
    captions: list[str] | None
    positions: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def images(self) -> Tensor:
        """float32 [B, C, H, W] in [-1, 1], computed where the pixels are."""
        return normalised(self.pixels, self.num_values)

    def to(self, device: torch.device) -> Batch:
        """The pixels on a device; the copy from pinned memory does not wait."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The pixels in memory that a CUDA device reads by itself."""
        return replace(self, pixels=self.pixels.pin_memory())


class _Prepared(NamedTuple):
    """A picture as far as no draw decides it, uint8 [C, h, w]; or the reason why there is none."""

    pixels: Tensor | None
    conversions: tuple[str, ...] = ()
    reason: str = ""


class _Kept:
    """Prepared pictures by index: in one tensor where all are of one size, which is lighter than many.

    Args:
        count: of all pictures.
        shape: of each, [C, H, W]; None where they differ.
    """

    def __init__(self, count: int, shape: tuple[int, int, int] | None) -> None:
        self._pixels: dict[int, Tensor] | Tensor = {}
        if shape is not None:
            self._pixels = torch.empty(count, *shape, dtype=torch.uint8)
        self._known = np.zeros(count, bool)
        self._reasons: dict[int, str] = {}

    def __contains__(self, index: int) -> bool:
        return bool(self._known[index])

    def __getitem__(self, index: int) -> _Prepared:
        reason = self._reasons.get(index)
        return _Prepared(self._pixels[index]) if reason is None else _Prepared(None, reason=reason)

    def __setitem__(self, index: int, picture: _Prepared) -> None:
        if picture.pixels is None:
            self._reasons[index] = picture.reason
        else:
            self._pixels[index] = picture.pixels
        self._known[index] = True


@dataclass
class _Rows:
    """What a worker makes of a batch."""

    pixels: NDArray[np.uint8]
    index: list[int] = field(default_factory=list)
    captions: list[str] | None = None
    unreadable: dict[int, str] = field(default_factory=dict)
    conversions: Counter[str] = field(default_factory=Counter)


class Batches(Sampler):
    """An endless sequence of batches; batch `step` holds positions step·batch_size onwards.

    The sample at global position p is the order's (`shuffled_index(seed, p, len(source))` unless another is
    given), and its augmentation comes from `augmentation_draws(seed, p)`. A picture that cannot be read is named
    in `source.unreadable` and replaced by one drawn for that position; too many of them stop the run.

    Args:
        source: the pictures.
        prepare: what is done to them.
        seed, batch_size, rank, world, order: see `Sampler`. `AspectBuckets` gives each batch its own height and
            width, `ShuffledShards` reads a few shards at a time.
        workers: processes that decode ahead; 0 decodes in this one, as for pictures that are kept.
        cache: whether pictures are kept, prepared, when they are decoded for the first time: "memory" keeps all,
            "none" none, "auto" all where they fit in 512 MiB.

    Raises:
        UserError: see `Sampler`.
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
        cache: Cache = "auto",
        order: Order | None = None,
    ) -> None:
        super().__init__(len(source), source.name, seed, batch_size, rank, world, order)
        if workers < 0:
            raise UserError(f"data.workers is {workers}: it must be at least 0.", key="data.workers")
        self.source, self.prepare, self.workers = source, prepare, workers
        shape = (prepare.channels, prepare.height, prepare.width)
        center = prepare.crop == "center"
        # A random crop keeps the whole resized picture; a ratio of 2:1 is a fair guess before any is seen.
        fits = len(source) * math.prod(shape) * (1 if center else 2) <= _AUTO_BYTES
        self._kept: _Kept | None = None
        if cache == "memory" or (cache == "auto" and fits):
            self._kept = _Kept(len(source), shape if center and self.order.size(0) is None else None)

    def at(self, step: int) -> Batch:
        """This process's part of batch `step`, made here: a function of (seed, step) alone.

        Raises:
            UserError: too many pictures are unreadable, or a shard is gone.
        """
        return self._finish(step, self._rows(step))

    def iterate(self, start_step: int = 0) -> Generator[Batch]:
        """Batches from `start_step` on, without end, the same as `at` gives, decoded ahead by the workers."""
        if self._kept is not None or self.workers == 0:
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
        samples = self.select(step)
        prepare = self._preparation(samples[0][0])
        rows = _Rows(np.empty((len(samples), prepare.channels, prepare.height, prepare.width), np.uint8))
        if self._kept is not None:
            new = sorted({index for index, *_ in samples if index not in self._kept})
            for index, picture in zip(new, in_threads(self.source, self._prepared, new), strict=True):
                self._keep(index, picture, rows)
        for pixels, (index, replacements, draw) in zip(rows.pixels, samples, strict=True):
            picture = self._picture(index, rows)
            while picture.pixels is None:
                rows.unreadable[index] = picture.reason
                index = next(replacements, -1)
                if index < 0:
                    raise UserError(
                        f"none of the images in {self.source.name} can be read.", key=self.source.name, code="damaged"
                    )
                picture = self._picture(index, rows)
            rows.index.append(index)
            pixels[:] = prepare.cut(picture.pixels, draw).numpy()
        captions = self.source.captions
        rows.captions = None if captions is None else [captions[i] for i in rows.index]
        return rows

    def _preparation(self, index: int) -> Preprocess:
        size = self.order.size(index)
        return self.prepare if size is None else replace(self.prepare, height=size[0], width=size[1])

    def _picture(self, index: int, rows: _Rows) -> _Prepared:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        return self._keep(index, self._prepared(index), rows)

    def _prepared(self, index: int) -> _Prepared:
        try:
            image, notes = self.source.decode(index)
        except UnreadablePicture as error:
            return _Prepared(None, reason=str(error))
        return _Prepared(self._preparation(index).resized(image), notes)

    def _keep(self, index: int, picture: _Prepared, rows: _Rows) -> _Prepared:
        rows.conversions.update(picture.conversions)
        if self._kept is not None:
            self._kept[index] = picture
        return picture

    def _finish(self, step: int, rows: _Rows | UserError) -> Batch:
        if isinstance(rows, UserError):
            raise rows
        source = self.source
        source.unreadable.update(rows.unreadable)
        source.conversions.update(rows.conversions)
        source.refuse_unreadable()
        return Batch(
            pixels=torch.from_numpy(rows.pixels),
            num_values=source.levels,
            label=None if source.labels is None else torch.from_numpy(source.labels[rows.index]),
            captions=rows.captions,
            positions=self.positions(step),
            names=[source.pictures.name(i) for i in rows.index],
        )


class _Movable(Protocol):
    def to(self, device: torch.device) -> Self: ...
    def pinned(self) -> Self: ...


def one_ahead(batches: Generator[Movable], device: torch.device) -> Generator[Movable]:
    """The batches on a device: while a step is computed there, a thread reads the batch of the next.

    On the CPU they come as they are: reading would take the cores away from the step.
    """

    def read() -> Movable:
        batch = next(batches)
        return batch.pinned() if device.type == "cuda" else batch

    if device.type == "cpu":
        yield from batches
        return
    with contextlib.closing(batches), ThreadPoolExecutor(1, "batches") as reader:
        batch = read()  # here, and not in the thread, from which workers would be forked
        while True:
            following = reader.submit(read)
            # No stream of its own: bytes are copied in a small part of the time of a step.
            yield batch.to(device)
            batch = following.result()


def normalised(pixels: Tensor, num_values: int) -> Tensor:
    """uint8 pixels of 0..num_values-1 as float32 in [-1, 1], of the same shape and device; what lies above is cut."""
    if num_values < 256:
        pixels = pixels.clamp(max=num_values - 1)  # bicubic may overshoot the white of the digits
    return pixels.to(torch.float32).mul_(2 / (num_values - 1)).sub_(1)


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
