"""Training on cached latents in place of images: the same samples at the same global positions as `Batches`."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
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
from carrara.data.order import Order, Sampler
from carrara.data.preprocess import Preprocess
from carrara.data.source import Source, counted
from carrara.errors import UserError

_AGAIN = "run `carrara data encode` again"


class LatentSource:
    """The latents of a data set, with random access; the files are mapped into memory, not read as a whole.

    Attributes:
        folder: the cache.
        index: of the cache.
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

    def stored(self, numbers: Sequence[int], flipped: Sequence[bool] | None = None) -> dict[str, Tensor]:
        """What is stored of some images, by name (see `latent_index.pack`), each [B, …].

        Args:
            numbers: which images.
            flipped: which of them mirrored; None takes all as they are.

        Raises:
            UserError: an image has no latent, or the cache was made without flips.
        """
        sides = [False] * len(numbers) if flipped is None else flipped
        if any(sides):
            self.refuse_flips()
        rows = []
        for number, side in zip(numbers, sides, strict=True):
            shard, row = self._places[number].tolist()
            if shard < 0:
                name = self.index.names[number]
                raise UserError(f"{name} has no latent: {self.unreadable[number]}.", key=name, code="missing")
            rows.append({name: value[row, int(side)] for name, value in self._shards[shard].items()})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def refuse_flips(self) -> None:
        """Raises UserError unless the cache holds mirrored images."""
        if not self.index.flips:
            raise UserError(
                f"{self.folder} holds no mirrored images: set data.flip=false, or encode with --flip.",
                key="data.flip",
                code="mismatch",
            )

    def posterior(self, numbers: Sequence[int], flipped: Sequence[bool] | None = None) -> Posterior:
        """q(z|x) of some images, as their codec's `encode` gave it: each use draws from it again."""
        return unpack(self.index.posterior, self.stored(numbers, flipped))


def open_latents(
    folder: str | Path,
    codec_hash: str | None = None,
    *,
    prepare: Preprocess | None = None,
    source: Source | None = None,
    verify: bool = True,
) -> LatentSource:
    """A cache that `carrara data encode` made.

    Args:
        folder: the cache.
        codec_hash: `content_hash` of the codec that is to decode; None takes any.
        prepare: what the images are to be prepared by; None takes any. (A cache with flips serves both.)
        source: the images, where they must still be those that were encoded.
        verify: read and hash every shard, and every image's file where there is a `source`; of several processes one
            is enough.

    Raises:
        UserError: there is no cache, it is unfinished or damaged, or its latents are of another codec, another
            preparation or other images.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None:
        raise UserError(
            f"there is no cache of latents in {folder}: make it with `carrara data encode`.",
            key=str(folder),
            code="missing",
        )
    if prepare is not None and index.flips and not prepare.flip:
        prepare = replace(prepare, flip=True)
    index.check(codec_hash, prepare, folder, "encode the images into another folder")
    for shard in index.shards:
        damage = damaged_shard(folder, shard, verify)
        if damage:
            raise UserError(
                f"{damage}: {_AGAIN}, which makes what is lost.", key=str(folder / shard.file), code="damaged"
            )
    if index.missing:
        raise UserError(
            f"{len(index.missing)} of {len(index.hashes)} images in {folder} have no latents: {_AGAIN}.",
            key=str(folder),
            code="missing",
        )
    if source is not None and verify:
        _refuse_stale(index, source, folder)
    return LatentSource(folder, index)


def _refuse_stale(index: Index, source: Source, folder: Path) -> None:
    """Raises UserError unless the images are those of the index."""
    hashes = file_hashes(source)
    if len(hashes) != len(index.hashes):
        raise UserError(
            f"{source.name} holds {counted(len(hashes), 'image')}, the latents in {folder} are of {len(index.hashes)}: "
            f"{_AGAIN}.",
            key=str(folder),
            code="mismatch",
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
                f"the first: {_AGAIN}.",
                key=stale[0],
                code="mismatch",
            )
    if (None if source.class_names is None else list(source.class_names)) != index.class_names:
        raise UserError(
            f"the classes of {source.name} have other names than in {folder}: {_AGAIN}.",
            key=str(folder),
            code="mismatch",
        )


@dataclass(frozen=True)
class LatentBatch:
    """What one process trains on in one step.

    Attributes:
        kind: of the posterior, see `latent_index.pack`.
        stored: what the cache holds of the samples, by name; codes have their `indices` here.
        label: int64 [B] or None.
        captions: B texts or None.
        positions: int64 [B], the global positions.
        names: what messages call the images.
    """

    kind: str
    stored: dict[str, Tensor]
    label: Tensor | None
    captions: list[str] | None
    positions: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def posterior(self) -> Posterior:
        """q(z|x) of every sample; `posterior.sample(noise)` is a fresh draw."""
        return unpack(self.kind, self.stored)

    def to(self, device: torch.device) -> LatentBatch:
        """With what is stored on a device; the copy from pinned memory does not wait."""
        return replace(self, stored={k: v.to(device, non_blocking=True) for k, v in self.stored.items()})

    def pinned(self) -> LatentBatch:
        """With what is stored in memory that a CUDA device reads by itself."""
        return replace(self, stored={k: v.pin_memory() for k, v in self.stored.items()})


class LatentBatches(Sampler):
    """An endless sequence of batches of latents. The sample at a global position, whether it is mirrored, and what
    replaces an unreadable one are the same as in `Batches` of the images.

    Args:
        source: the latents.
        seed, batch_size, rank, world, order: see `Sampler`.
        flip: mirror half of the samples; the cache must hold flips.

    Raises:
        UserError: see `Sampler`; or flips that are not there.
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
        super().__init__(len(source), source.name, seed, batch_size, rank, world, order)
        if flip:
            source.refuse_flips()
        self.source, self.flip = source, flip

    def at(self, step: int) -> LatentBatch:
        """This process's part of batch `step`: a function of (seed, step) alone."""
        source, samples = self.source, self.select(step)
        numbers = [self._readable(index, replacements) for index, replacements, _ in samples]
        return LatentBatch(
            kind=source.index.posterior,
            stored=source.stored(numbers, [draw[2] < 0.5 for *_, draw in samples] if self.flip else None),
            label=None if source.labels is None else torch.from_numpy(source.labels[numbers]),
            captions=None if source.captions is None else [source.captions[number] for number in numbers],
            positions=self.positions(step),
            names=[source.index.names[number] for number in numbers],
        )

    def iterate(self, start_step: int = 0) -> Generator[LatentBatch]:
        """Batches from `start_step` on, without end."""
        yield from map(self.at, itertools.count(start_step))

    def _readable(self, number: int, replacements: Iterator[int]) -> int:
        for candidate in itertools.chain([number], replacements):
            if candidate not in self.source.unreadable:
                return candidate
        raise UserError(f"none of the images in {self.source.name} has a latent.", key=self.source.name, code="damaged")
