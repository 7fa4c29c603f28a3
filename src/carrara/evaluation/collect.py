"""From a stream of images to what every figure needs: moments of all, the rows of the first few."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.features import Features
from carrara.evaluation.moments import Moments

ROWS = 10_000


@dataclass(frozen=True)
class Collected:
    """The features of a set of images.

    Attributes:
        moments: of all images.
        rows: float32 [min(N, kept), D], the features of the first images, for figures that need pairs.
        shape: an image's [C, H, W].
        content: hash of the images as 8-bit pictures, in their order: 32 hexadecimal digits.
    """

    moments: Moments
    rows: Tensor
    shape: tuple[int, ...]
    content: str


def collect(batches: Iterable[Tensor], features: Features, rows: int = ROWS) -> Collected:
    """Streams batches of images [B, C, H, W] in [-1, 1] through a feature network.

    Memory depends on `rows`, not on the number of images; the last, smaller batch counts like any other.

    Raises:
        UserError: no images at all, images of different sizes, or features that are not finite.
    """
    moments: Moments | None = None
    kept: list[Tensor] = []
    shape: tuple[int, ...] | None = None
    digest = hashlib.blake2b(digest_size=16)
    for images in batches:
        shape = shape or tuple(images.shape[1:])
        if tuple(images.shape[1:]) != shape:
            raise UserError(
                f"an image of shape {list(images.shape[1:])} follows images of {list(shape)}: "
                "bring all to one resolution and number of channels."
            )
        digest.update(((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy().tobytes())
        found = features(images)
        moments = (moments or Moments(found.shape[1])).update(found)
        missing = rows - sum(map(len, kept))
        if missing > 0:
            kept.append(found[:missing].float().cpu())
    if moments is None or shape is None:
        raise UserError("there are no images to measure: give a folder, archive or model that has some.")
    first = torch.cat(kept) if kept else torch.empty(0, moments.dimension)
    return Collected(moments, first, shape, digest.hexdigest())
