"""From a stream of images to what every figure needs: moments of all, the rows of the first few."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.distributed import in_turn
from carrara.errors import UserError
from carrara.evaluation.features import Features
from carrara.evaluation.moments import Moments
from carrara.evaluation.pictures import Pictures
from carrara.images import to_uint8

ROWS = 10_000
SHOWN = 100


@dataclass(frozen=True)
class Collected:
    """The features of a set of images.

    Attributes:
        moments: of all images.
        rows: float32 [min(N, kept), D], the features of the first images, for figures that need pairs.
        shape: an image's [C, H, W].
        content: hash of the images as 8-bit pictures, in their order: 32 hexadecimal digits.
        first: uint8 [min(N, SHOWN), H, W, C], the first images, for a report.
        read: int64 [min(N, kept)], the classes that a judge read in the first images; None without a judge.
    """

    moments: Moments
    rows: Tensor
    shape: tuple[int, ...]
    content: str
    first: Tensor
    read: Tensor | None = None


def collect(batches: Iterable[Tensor], features: Features, rows: int = ROWS) -> Collected:
    """Streams batches of images [B, C, H, W] in [-1, 1] through a feature network.

    Memory depends on `rows`, not on the number of images; the last, smaller batch counts like any other.

    Raises:
        UserError: no images at all, images of different sizes, or features that are not finite.
    """
    return _joined((_see(images, features) for images in batches), rows)


def collect_together(
    pictures: Pictures,
    features: Features,
    rows: int = ROWS,
    check: Callable[[Tensor], None] | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """The same of pictures that are made or read while they are seen, batch by batch by every process in turn.

    Every process gets all features and adds them in the order of the pictures, so that the result is the same,
    bit for bit, for any number of processes.

    Args:
        check: sees the first batch a process made, before hours go into the others.
        read: a judge that tells the class of every image, int64 [B].
        progress: is told after each batch how many pictures it held.
    """
    unchecked = [check] if check is not None else []

    def work(part: range) -> _Seen:
        images = pictures.make(part)
        while unchecked:
            unchecked.pop()(images)
        return _see(images, features, SHOWN - part.start, read)

    def seen() -> Iterable[_Seen]:
        for found in in_turn(pictures.parts, work):
            yield found
            if progress is not None:
                progress(len(found.digests))

    return _joined(seen(), rows, pictures.count)


@dataclass(frozen=True)
class _Seen:
    """One batch: its features, a hash of each picture, their [C, H, W], and those that are shown, [B, H, W, C]."""

    features: Tensor
    digests: list[bytes]
    shape: tuple[int, ...]
    pixels: Tensor
    read: Tensor | None


def _see(
    images: Tensor, features: Features, shown: int = SHOWN, read: Callable[[Tensor], Tensor] | None = None
) -> _Seen:
    pixels = to_uint8(images)
    digests = [hashlib.blake2b(picture.tobytes(), digest_size=16).digest() for picture in pixels.numpy()]
    classes = None if read is None else read(images).cpu()
    return _Seen(features(images).cpu(), digests, tuple(images.shape[1:]), pixels[: max(0, shown)].clone(), classes)


def _joined(batches: Iterable[_Seen], rows: int, expected: int = 0) -> Collected:
    moments: Moments | None = None
    shape: tuple[int, ...] | None = None
    kept: list[Tensor] = []
    shown: list[Tensor] = []
    read: list[Tensor] = []
    digest = hashlib.blake2b(digest_size=16)
    for seen in batches:
        shape = shape or seen.shape
        if seen.shape != shape:
            raise UserError(
                f"an image of shape {list(seen.shape)} follows images of {list(shape)}: "
                "bring all to one resolution and number of channels."
            )
        digest.update(b"".join(seen.digests))
        moments = (moments or Moments(seen.features.shape[1], expected)).update(seen.features)
        if (missing := rows - sum(map(len, kept))) > 0:
            kept.append(seen.features[:missing].float())
            read += [] if seen.read is None else [seen.read[:missing]]
        if (missing := SHOWN - sum(map(len, shown))) > 0:
            shown.append(seen.pixels[:missing])
    if moments is None or shape is None:
        raise UserError("there are no images to measure: give a folder, archive or model that has some.")
    first = torch.cat(kept) if kept else torch.empty(0, moments.dimension)
    return Collected(moments, first, shape, digest.hexdigest(), torch.cat(shown), torch.cat(read) if read else None)
