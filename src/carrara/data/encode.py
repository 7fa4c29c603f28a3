"""Making a cache of latents: every image of a data set through a codec, once.

A latent is known by the hash of its image's file; the cache as a whole belongs to one codec and one preparation, both
named in its index. So encoding again does only what is new. What is stored is the posterior, not a draw from it, and
the mirrored image as an entry of its own: training draws again at every use (a draw or a flip frozen at caching time
is a smaller data set).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from carrara.codecs import Codec, content_hash, whole
from carrara.data.batches import in_threads, normalised
from carrara.data.decode import UnreadablePicture
from carrara.data.latent_index import (
    Index,
    Shard,
    append_shard,
    damaged_shard,
    digest,
    pack,
    read_index,
    start_journal,
    write_index,
)
from carrara.data.preprocess import Preprocess
from carrara.data.source import Source
from carrara.errors import UserError
from carrara.files import locked, write_whole

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Encoded:
    """What encoding a data set did.

    Attributes:
        images: in the data set.
        encoded: of these, how many went through the codec now.
        unreadable: how many have no latent, since they cannot be read.
        shards: files written now.
        bytes_per_image: of the cache, for one image (both entries where there are flips).
    """

    images: int
    encoded: int
    unreadable: int
    shards: int
    bytes_per_image: float


@torch.no_grad()
def encode_latents(
    source: Source,
    prepare: Preprocess,
    codec: Codec,
    folder: str | Path,
    *,
    batch_size: int = 32,
    shard_images: int = 1024,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Encoded:
    """Bring a cache up to date with a data set: encode what is new or changed, forget what is gone.

    Every shard is on disk whole before the index names it, so that an interrupted run resumes where it was.

    Args:
        source: the images.
        prepare: what is done to them; `flip` gives every image a second entry, mirrored.
        codec: any; in evaluation mode meanwhile.
        folder: the cache.
        batch_size: images encoded at once.
        shard_images: images in one file, at most.
        device: where the codec lies.
        progress: called with (phase, images done, images in all), the phases being "checking" and "encoding".

    Raises:
        UserError: the folder holds the latents of another codec or preparation, the images do not fit the codec, the
            codec's posterior cannot be stored, latents are not finite, too many images are unreadable, or the
            folder cannot be made or another process encodes into it.
    """
    if prepare.crop != "center":
        raise UserError(
            "a cache would freeze one random crop of each image: set data.crop=center to cache latents.",
            key="data.crop",
            code="conflict",
        )
    folder = Path(folder)
    shape = codec.latent_shape((prepare.channels, prepare.height, prepare.width))
    with locked(folder, f"another process encodes into {folder}: wait for it, or name another folder."):
        index = read_index(folder) or Index(
            {"kind": codec.kind, "hash": content_hash(codec)}, asdict(prepare), source.levels, "", shape
        )
        index.check(content_hash(codec), prepare, folder, "encode into another folder, or remove this one")
        _describe(index, source, progress)
        _drop_lost(index, folder)
        module = whole(codec)
        training = isinstance(module, nn.Module) and module.training
        if isinstance(module, nn.Module):
            module.eval()
        try:
            work = _Work(index, source, prepare, codec, folder, batch_size, device)
            encoded, shards = work.encode_missing(max(batch_size, shard_images // batch_size * batch_size), progress)
        finally:
            if isinstance(module, nn.Module):
                module.train(training)
        _forget(index, folder)
    size = sum(shard.size for shard in index.shards) / max(1, sum(shard.images for shard in index.shards))
    return Encoded(len(source), encoded, len(source.unreadable), shards, size)


def file_hash(encoded: bytes) -> str:
    """By which a cache knows an image's file: 32 hexadecimal digits."""
    return digest(encoded).hexdigest()


def file_hashes(source: Source, progress: Progress | None = None) -> list[str | None]:
    """The hash of every image's file, None for one that cannot be read (which `source.unreadable` then names)."""

    def one(number: int) -> tuple[str | None, str]:
        try:
            return file_hash(source.pictures.read(number)), ""
        except UnreadablePicture as error:
            return None, str(error)

    hashes = []
    for number, (key, reason) in enumerate(in_threads(source, one, range(len(source)))):
        if key is None:
            source.unreadable[number] = reason
        hashes.append(key)
        if progress is not None and (number % 256 == 255 or number + 1 == len(source)):
            progress("checking", number + 1, len(source))
    return hashes


@dataclass(frozen=True)
class _Work:
    """Encoding what a cache lacks."""

    index: Index
    source: Source
    prepare: Preprocess
    codec: Codec
    folder: Path
    batch_size: int
    device: torch.device | str

    def encode_missing(self, shard_images: int, progress: Progress | None) -> tuple[int, int]:
        """Encode what has no latents, of equal files one; how many images were encoded and files written."""
        index = self.index
        numbers = sorted({index.hashes[number]: number for number in reversed(index.missing)}.values())
        encoded = shards = 0
        for start in range(0, len(numbers), shard_images):
            done: list[int] = []
            parts: list[dict[str, Tensor]] = []
            unreadable: dict[str, str] = {}
            for first in range(start, min(start + shard_images, len(numbers)), self.batch_size):
                batch = numbers[first : min(first + self.batch_size, start + shard_images)]
                good, pixels = self._pixels(batch, unreadable)
                if good:
                    posterior, latents = self._latents(pixels)
                    self._refuse_broken(good, latents)
                    parts.append(latents)
                    done += good
                if progress is not None:
                    progress("encoding", first + len(batch), len(numbers))
            shard = self._write(len(done), parts) if done else None
            keys = [str(index.hashes[number]) for number in done]
            if start == 0:
                start_journal(self.folder, index)
            append_shard(self.folder, index, shard, keys, unreadable, posterior if done else "")
            encoded, shards = encoded + len(done), shards + bool(done)
            self.source.refuse_unreadable()
        return encoded, shards

    def _pixels(self, numbers: Sequence[int], unreadable: dict[str, str]) -> tuple[list[int], Tensor]:
        """Those of the images that are pictures, uint8 [B, C, H, W]; the reasons of the others, by hash."""

        def one(number: int) -> Tensor | str:
            try:
                return self.prepare.resized(self.source.decode(number)[0])
            except UnreadablePicture as error:
                return str(error)

        good, pixels = [], []
        for number, picture in zip(numbers, in_threads(self.source, one, numbers), strict=True):
            if isinstance(picture, str):
                self.source.unreadable[number] = unreadable[str(self.index.hashes[number])] = picture
            else:
                good.append(number)
                pixels.append(picture)
        return good, torch.stack(pixels) if pixels else torch.empty(0)

    def _latents(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        """The posterior's kind and what is stored of it: [B, F, …], F is 1, or 2 with the mirrored images second."""
        images = normalised(pixels.to(self.device), self.source.levels)
        entries = [images, images.flip(-1)] if self.prepare.flip else [images]
        kinds, packed = zip(*(pack(self.codec.encode(entry)) for entry in entries), strict=True)
        return kinds[0], {name: torch.stack([tensors[name] for tensors in packed], dim=1) for name in packed[0]}

    def _refuse_broken(self, numbers: Sequence[int], latents: dict[str, Tensor]) -> None:
        for number, *rows in zip(numbers, *latents.values(), strict=True):
            if not all(bool(row.isfinite().all()) for row in rows):
                raise UserError(
                    f"the latents of {self.index.names[number]} are not finite: name another codec, or train this one "
                    "again.",
                    key=self.index.names[number],
                    code="not_finite",
                )

    def _write(self, images: int, parts: Sequence[dict[str, Tensor]]) -> Shard:
        """One more file."""
        from safetensors.torch import save

        used = [int(shard.file.removeprefix("latents-").split(".")[0]) for shard in self.index.shards]
        name = f"latents-{max(used, default=-1) + 1:05d}.safetensors"
        content = save({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        write_whole(self.folder / name, content)
        return Shard(name, images, len(content), digest(content).hexdigest())


def _describe(index: Index, source: Source, progress: Progress | None) -> None:
    """Write into the index what the data set is now."""
    index.levels = source.levels
    index.hashes = file_hashes(source, progress)
    index.names = [source.pictures.name(number) for number in range(len(source))]
    index.labels = None if source.labels is None else source.labels.tolist()
    index.captions = None if source.captions is None else list(source.captions)
    index.class_names = None if source.class_names is None else list(source.class_names)
    for number, key in enumerate(index.hashes):
        if key in index.unreadable:
            source.unreadable[number] = index.unreadable[key]
    source.refuse_unreadable()


def _drop_lost(index: Index, folder: Path) -> None:
    """Forget the latents in files that are missing, cut short or damaged, so that they are made again."""
    lost = {number for number, shard in enumerate(index.shards) if damaged_shard(folder, shard)}
    index.places = {key: place for key, place in index.places.items() if place[0] not in lost}


def _forget(index: Index, folder: Path) -> None:
    """Forget latents of images that are gone, and remove files that hold none of the others."""
    wanted = {key for key in index.hashes if key is not None}
    index.places = {key: place for key, place in index.places.items() if key in wanted}
    index.unreadable = {key: reason for key, reason in index.unreadable.items() if key in wanted}
    used = sorted({number for number, _ in index.places.values()})
    index.places = {key: (used.index(number), row) for key, (number, row) in index.places.items()}
    index.shards = [index.shards[number] for number in used]
    write_index(folder, index)  # before the files go, so that no index ever names one that is not there
    kept = {shard.file for shard in index.shards}
    for path in folder.glob("latents-*.safetensors"):
        if path.name not in kept:
            path.unlink()
