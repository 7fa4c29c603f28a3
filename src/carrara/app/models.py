"""Models as the use cases open them: on a device, at a precision, perhaps with another decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from carrara import codecs, weights
from carrara.devices import compute_in, resolve_precision
from carrara.model import DiffusionModel


def open_model(
    path: str | Path, device: torch.device, precision: str = "auto", codec: str | None = None
) -> DiffusionModel:
    """A model, ready to sample; a precision other than fp32 is recorded in its `origin`, and so in its samples.

    Args:
        codec: a codec whose decoder was fine-tuned, in place of the model's own.

    Raises:
        UserError: there is no model, it is damaged, or the device cannot compute at this precision.
    """
    chosen = resolve_precision(precision, device)
    model = DiffusionModel.load(path, device)
    model = model if codec is None else model.with_codec(codecs.load(codec, device))
    compute_in(model.network, chosen, device)
    return model if chosen == "fp32" else replace(model, origin=f"{model.origin}, {chosen}")


def is_codec(subject: str) -> bool:
    """Whether a path holds a codec alone, which makes no pictures by itself."""
    return weights.holds(subject) and weights.kind_of(subject) == "codec"
