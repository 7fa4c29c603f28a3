"""Feature networks: images in, one row for each out, with the name and checksum that a metric must carry."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from carrara.errors import UserError, nearest
from carrara.evaluation.features.inception import Inception
from carrara.evaluation.features.pixels import Pixels

__all__ = ["Features", "Inception", "Pixels", "open_features"]


class Features(Protocol):
    """A callable from a batch of images [N, C, H, W] in [-1, 1] to features [N, D].

    Attributes:
        name: how metrics name them.
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


KINDS = ("pixels", "inception", "clip", "dinov2", "classifier")


def open_features(
    word: str, device: torch.device | str = "cpu", preparation: str = "tensorflow", checksum: str | None = None
) -> Features:
    """The feature network that a word names: "pixels", "inception=WEIGHTS", "clip=FOLDER", "dinov2=FOLDER" or
    "classifier=RUN" (one that Carrara trained).

    Args:
        word: the kind and, after "=", the local file or folder of its weights.
        preparation: Inception's resize, one of `preparation.INCEPTION`.
        checksum: the SHA-256 that Inception's file must have; by default that of one of the published files.

    Raises:
        UserError: an unknown kind, or weights that are not given, missing or of another checksum.
    """
    kind, _, path = word.partition("=")
    if kind not in KINDS:
        raise UserError(f"there are no features '{kind}': {nearest(kind, KINDS)}", key="features", code="unknown")
    if checksum is not None and kind != "inception":
        raise UserError(
            f"only Inception's weights have a checksum, and the features are '{kind}': leave it out.",
            key="checksum",
            code="conflict",
        )
    if kind == "pixels":
        return Pixels()
    if not path:
        raise UserError(
            f"the features '{kind}' need their weights from a local path: write {kind}=PATH.",
            key="features",
            code="missing",
        )
    if kind == "inception":
        return Inception.load(Path(path), checksum, preparation, device)
    if kind == "classifier":
        from carrara.classifier import Classifier
        from carrara.evaluation.features.classifier import ClassifierFeatures

        classifier = Classifier.load(path, device)
        return ClassifierFeatures(classifier.network, classifier.clean_network_time)
    from carrara.evaluation.features.pretrained import Clip, Dino

    return Clip(path, device) if kind == "clip" else Dino(path, device)
