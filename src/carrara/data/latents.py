"""Training on cached latents in place of images: the same samples at the same global positions as `Batches`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carrara.codecs import Posterior
from carrara.data.encode import file_hashes
from carrara.data.latent_index import Index, damaged_shard, read_index, unpack
from carrara.data.order import Order, Shuffled, augmentation_draws
from carrara.data.preprocess import Preprocess
from carrara.data.source import Source, counted
from carrara.errors import UserError

_AGAIN = "run `carrara data encode` again"


class LatentSource:
    """The latents of a data set, with random access; the files are mapped into memory, not read as a whole.

    Attributes:
        folder: the cache.
        index: what it says of itself.
        labels: int64 [N] in 0..K-1, or None.
        captions: N texts, or None.
        class_names: K names, or None.
        unreadable: reason by number, for each image that has no latent.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        from safetensors.torch import load_file

        self.folder, self.index = folder, index
        self.labels = None if index.labels is None else np.asarray(index.labels, dtype=np.int64)
        self.captions = index.captions
        self.class_names = None if index.class_names is None else tuple(index.class_names)
        self._shards = [load_file(folder / shard.file) for shard in index.shards]
        places = [index.places.get(str(key), (-1, -1)) for key in index.hashes]
        self._places: NDArray[np.int64] = np.asarray(places, dtype=np.int64).reshape(-1, 2)
        self.unreadable = {
            int(number): index.unreadable.get(str(index.hashes[number]), "the file cannot be read")
            for number in np.flatnonzero(self._places[:, 0] < 0)
        }

    def __len__(self) -> int:
        return len(self.index.hashes)

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.folder)

    @property
    def shape(self) -> tuple[int, ...]:
        """A latent's [C', h, w]."""
        return self.index.shape

    @property
    def levels(self) -> int:
        """See `Source.levels`."""
        return self.index.levels

    def stored(self, numbers: Sequence[int], flipped: Sequence[bool] | None = None) -> dict[str, Tensor]:
        """What is stored of some images, by name (see `latent_index.pack`), each [B, …].

        Args:
            numbers: which images.
            flipped: which of them mirrored; None takes all as they are.

        Raises:
            UserError: an image has no latent, or the cache was made without flips.
        """
        sides = [False] * len(numbers) if flipped is None else flipped
        if any(sides) and not self.index.flips:
            raise UserError(f"{self.folder} holds no mirrored images: set data.flip=false, or encode with --flip.")
        rows = []
        for number, side in zip(numbers, sides, strict=True):
            shard, row = self._places[number].tolist()
            if shard < 0:
                raise UserError(f"{self.index.names[number]} has no latent: {self.unreadable[number]}.")
            rows.append({name: value[row, int(side)] for name, value in self._shards[shard].items()})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def posterior(self, numbers: Sequence[int], flipped: Sequence[bool] | None = None) -> Posterior:
        """q(z|x) of some images, as their codec's `encode` gave it: draw from it anew at every use."""
        return unpack(self.index.posterior, self.stored(numbers, flipped))


def open_latents(
    folder: str | Path,
    codec_hash: str | None = None,
    *,
    prepare: Preprocess | None = None,
    source: Source | None = None,
) -> LatentSource:
    """A cache that `carrara data encode` made.

    Args:
        folder: the cache.
        codec_hash: `content_hash` of the codec that is to decode; None takes any.
        prepare: what the images are to be prepared by; None takes any. (A cache with flips serves both.)
        source: the images, where they must still be those that were encoded (each file is read and hashed).

    Raises:
        UserError: there is no cache, it is unfinished or damaged, or its latents are of another codec, another
            preparation or other images.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None:
        raise UserError(f"there is no cache of latents in {folder}: make it with `carrara data encode`.")
    if prepare is not None and index.flips and not prepare.flip:
        prepare = replace(prepare, flip=True)
    index.check(codec_hash, prepare, folder, "encode the images anew into another folder")
    for shard in index.shards:
        damage = damaged_shard(folder, shard)
        if damage:
            raise UserError(f"{damage}: {_AGAIN}, which makes what is lost.")
    if index.missing:
        raise UserError(f"{len(index.missing)} of {len(index.hashes)} images in {folder} have no latents: {_AGAIN}.")
    if source is not None:
        _refuse_stale(index, source, folder)
    return LatentSource(folder, index)


def _refuse_stale(index: Index, source: Source, folder: Path) -> None:
    hashes = file_hashes(source)
    if len(hashes) != len(index.hashes):
        raise UserError(
            f"{source.name} holds {counted(len(hashes), 'image')}, the latents in {folder} are of {len(index.hashes)}: "
            f"{_AGAIN}."
        )
    count = len(hashes)
    names = [source.pictures.name(number) for number in range(count)]
    nothing: list[Any] = [None] * count
    labels = nothing if source.labels is None else source.labels.tolist()
    captions = nothing if source.captions is None else list(source.captions)
    known = zip(index.hashes, index.names, index.labels or nothing, strict=True)
    for what, now, then in (
        ("images in", list(zip(hashes, names, labels, strict=True)), list(known)),
        ("captions of", captions, index.captions or nothing),
    ):
        stale = [name for name, own, other in zip(names, now, then, strict=True) if own != other]
        if stale:
            raise UserError(
                f"{len(stale)} of {count} {what} {source.name} are not those whose latents {folder} holds, {stale[0]} "
                f"the first: {_AGAIN}."
            )
    if (None if source.class_names is None else list(source.class_names)) != index.class_names:
        raise UserError(f"the classes of {source.name} have other names than in {folder}: {_AGAIN}.")


@dataclass(frozen=True)
class LatentBatch:
    """What one process trains on in one step.

    Attributes:
        posterior: q(z|x) of every sample; `posterior.sample(noise)` is a fresh draw.
        stored: what the cache holds of the samples, by name; codes have their `indices` here.
        label: int64 [B] or None.
        captions: B texts or None.
        positions: int64 [B], the global positions.
        names: what messages call the images.
    """

    posterior: Posterior
    stored: dict[str, Tensor]
    label: Tensor | None
    captions: list[str] | None
    positions: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.positions)


class LatentBatches:
    """An endless sequence of batches of latents, walked as `Batches` walks images: the sample at a global position,
    whether it is mirrored, and what replaces an unreadable one are the same.

    Args:
        source: the latents.
        seed: of order and flips.
        batch_size: the global batch, over all processes.
        rank, world: this process and their number; it takes its own slice of each global batch.
        flip: mirror half of the samples; the cache must hold flips.
        order: which sample stands where; None is `Shuffled`.

    Raises:
        UserError: fewer images than a batch, a batch that the processes cannot share, or flips that are not there.
    """

    def __init__(
        self,
        source: LatentSource,
        seed: int = 0,
        batch_size: int = 64,
        rank: int = 0,
        world: int = 1,
        *,
        flip: bool = False,
        order: Order | None = None,
    ) -> None:
        if batch_size < 1 or batch_size > len(source):
            raise UserError(
                f"{source.name} holds {counted(len(source), 'image')}, which do not fill a batch of {batch_size}: "
                f"set training.batch_size to 1..{len(source)}."
            )
        if batch_size % world or not 0 <= rank < world:
            raise UserError(f"a batch of {batch_size} cannot be shared by {world} processes: make it a multiple.")
        if flip and not source.index.flips:
            raise UserError(f"{source.name} holds no mirrored images: set data.flip=false, or encode with --flip.")
        self.source, self.seed, self.batch_size = source, seed, batch_size
        self.rank, self.world, self.flip = rank, world, flip
        self.order: Order = Shuffled(len(source)) if order is None else order
        self.order.check(len(source), batch_size)

    def positions(self, step: int) -> Tensor:
        """The global positions of this process's part of batch `step`: int64 [batch_size / world]."""
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return torch.arange(start, start + share)

    def at(self, step: int) -> LatentBatch:
        """This process's part of batch `step`: a function of (seed, step) alone."""
        positions = self.positions(step)
        selection = self.order.select(self.seed, positions.numpy())
        draws = augmentation_draws(self.seed, int(positions[0]), len(positions))
        numbers = [
            self._readable(number, selection.pool, draw[3])
            for number, draw in zip(selection.index.tolist(), draws.tolist(), strict=True)
        ]
        flipped = (draws[:, 2] < 0.5).tolist() if self.flip else None
        source = self.source
        stored = source.stored(numbers, flipped)
        return LatentBatch(
            posterior=unpack(source.index.posterior, stored),
            stored=stored,
            label=None if source.labels is None else torch.from_numpy(source.labels[numbers]),
            captions=None if source.captions is None else [source.captions[number] for number in numbers],
            positions=positions,
            names=[source.index.names[number] for number in numbers],
        )

    def iterate(self, start_step: int = 0) -> Iterator[LatentBatch]:
        """Batches from `start_step` on, without end."""
        yield from map(self.at, itertools.count(start_step))

    def _readable(self, number: int, pool: NDArray[np.int64] | None, draw: float) -> int:
        """The image itself; where it has no latent, the next one that has from a drawn place of the pool."""
        if number not in self.source.unreadable:
            return number
        count = len(self.source) if pool is None else len(pool)
        for attempt in range(count):
            place = (int(draw * count) + attempt) % count
            other = place if pool is None else int(pool[place])
            if other not in self.source.unreadable:
                return other
        raise UserError(f"none of the {count} images in {self.source.name} has a latent.")
