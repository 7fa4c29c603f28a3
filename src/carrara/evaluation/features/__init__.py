"""Feature networks: images in, one row for each out, with the name and checksum that a figure must carry."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from carrara.evaluation.features.inception import Inception
from carrara.evaluation.features.pixels import Pixels

__all__ = ["Features", "Inception", "Pixels"]


class Features(Protocol):
    """A callable from a batch of images [N, C, H, W] in [-1, 1] to features [N, D].

    Attributes:
        name: what a figure says it was taken in.
        checksum: SHA-256 of the weights, "" where there are none.
        preparation: how images are resized and scaled before they enter.
    """

    @property
    def name(self) -> str: ...
    @property
    def checksum(self) -> str: ...
    @property
    def preparation(self) -> str: ...
    def __call__(self, images: Tensor) -> Tensor: ...
