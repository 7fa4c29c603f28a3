"""From a stream of images to what every metric needs: moments of all, the rows of the first few."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.distributed import in_turn
from carrara.errors import UserError
from carrara.evaluation.features import Features
from carrara.evaluation.moments import Moments, Statistics
from carrara.evaluation.pictures import Pictures
from carrara.images import to_uint8

ROWS = 10_000
SHOWN = 100


@dataclass(frozen=True)
class Collected:
    """The features of a set of images.

    Attributes:
        statistics: mean and covariance of all images.
        rows: float32 [min(N, kept), D], the features of the first images, for metrics of pairs.
        shape: an image's [C, H, W].
        content: hash of the images as 8-bit pictures, in their order: 32 hexadecimal digits.
        first: uint8 [min(N, SHOWN), H, W, C], the first images, for a report.
        classes: int64 [min(N, kept)], the classes that a classifier predicts for the first images, or None.
    """

    statistics: Statistics
    rows: Tensor
    shape: tuple[int, ...]
    content: str
    first: Tensor
    classes: Tensor | None = None


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
    classify: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """The same of pictures that are made or read while they are seen, batch by batch by every process in turn.

    Every process gets all features and adds them in the order of the pictures, so that the result is the same,
    bit for bit, for any number of processes.

    Args:
        check: sees the first batch a process made, before hours go into the others.
        classify: predicts the class of every image, int64 [B].
        progress: called after each batch with how many pictures it contains.
    """
    unchecked = [check] if check is not None else []

    def work(part: range) -> _Seen:
        images = pictures.make(part)
        while unchecked:
            unchecked.pop()(images)
        return _see(images, features, SHOWN - part.start, classify)

    def seen() -> Iterable[_Seen]:
        for batch in in_turn(pictures.parts, work):
            yield batch
            if progress is not None:
                progress(len(batch.digests))

    return _joined(seen(), rows, pictures.count)


@dataclass(frozen=True)
class _Seen:
    """One batch: its features, a hash of each picture, their [C, H, W], and those that are shown, [B, H, W, C]."""

    features: Tensor
    digests: list[bytes]
    shape: tuple[int, ...]
    pixels: Tensor
    classes: Tensor | None


def _see(
    images: Tensor, features: Features, shown: int = SHOWN, classify: Callable[[Tensor], Tensor] | None = None
) -> _Seen:
    pixels = to_uint8(images)
    digests = [hashlib.blake2b(picture.tobytes(), digest_size=16).digest() for picture in pixels.numpy()]
    classes = None if classify is None else classify(images).cpu()
    return _Seen(features(images).cpu(), digests, tuple(images.shape[1:]), pixels[: max(0, shown)].clone(), classes)


def _joined(batches: Iterable[_Seen], rows: int, expected: int = 0) -> Collected:
    moments: Moments | None = None
    shape: tuple[int, ...] | None = None
    first: list[Tensor] = []
    shown: list[Tensor] = []
    classes: list[Tensor] = []
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        shape = shape or batch.shape
        if batch.shape != shape:
            raise UserError(
                f"an image of shape {list(batch.shape)} follows images of {list(shape)}: "
                "bring all to one resolution and number of channels.",
                key="resolution",
                code="shape",
            )
        digest.update(b"".join(batch.digests))
        moments = (moments or Moments(batch.features.shape[1], expected)).update(batch.features)
        if (missing := rows - sum(map(len, first))) > 0:
            first.append(batch.features[:missing].float())
            classes += [] if batch.classes is None else [batch.classes[:missing]]
        if (missing := SHOWN - sum(map(len, shown))) > 0:
            shown.append(batch.pixels[:missing])
    if moments is None or shape is None:
        raise UserError(
            "there are no images to measure: give a folder, archive or model that has some.", key="n", code="missing"
        )
    kept = torch.cat(first) if first else torch.empty(0, moments.dimension)
    joined = torch.cat(classes) if classes else None
    return Collected(moments.statistics(), kept, shape, digest.hexdigest(), torch.cat(shown), joined)
