"""The one loader: whatever Carrara saved in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from carrara import codecs, weights
from carrara.classifier import Classifier
from carrara.codecs import Codec
from carrara.devices import resolve_device
from carrara.errors import UserError, nearest
from carrara.model import DiffusionModel
from carrara.scorer import Scorer

Loaded = DiffusionModel | Classifier | Codec | Scorer

LOADERS: dict[str, Callable[[Path, torch.device | str], Loaded]] = {
    "diffusion": DiffusionModel.load,
    "classifier": Classifier.load,
    "codec": codecs.load,
    "scorer": Scorer.load,
}
"""By the `kind` of `config.json`."""


def load(path: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """The model, classifier, codec or scorer in a folder, or in the `model/` folder of a run.

    Args:
        device: a device, its name, or "auto" (`carrara.devices`).

    Raises:
        UserError: nothing that Carrara saved, a missing or cut file, a newer version, or no such device.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    folder = weights.find(path)
    kind = weights.kind_of(folder)
    if kind not in LOADERS:
        raise UserError(
            f"{folder} contains something of the unknown kind '{kind}': {nearest(kind, LOADERS)}",
            key=str(folder),
            code="unknown",
        )
    return LOADERS[kind](folder, device)
