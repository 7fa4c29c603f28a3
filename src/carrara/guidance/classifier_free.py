"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.guidance.combine import ask_together, extrapolate
from carrara.guidance.rescale import Quantity, rescaled
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time

Null = Condition | Callable[[Time], Condition]
"""The condition of "nothing said", one row or the batch's; or a function of t that gives it."""


def classifier_free(scale: float, null: Null, *, rescale: float = 0.0, of: Quantity = "eps") -> Guide:
    """ε̂ = ε_∅ + w (ε_c - ε_∅): w = 1 is the plain conditional model and costs one pass; the paper's 1 + ω is w.

    Conditional and null rows share one call. Only the prediction is guided: a learned variance stays the
    conditional one. A negative condition (what should not be seen) takes the place of the null.

    Args:
        scale: w, any finite number.
        null: what the guidance leads away from.
        rescale: φ in 0..1, see `carrara.guidance.rescale`.
        of: what φ is measured on.

    Raises:
        UserError: the scale is NaN or infinite, or φ lies outside 0..1.
    """
    check_scale(scale)
    if not 0 <= rescale <= 1:
        raise UserError(f"the guidance rescale must lie in 0..1, {rescale} does not.")

    def guide(denoiser: Denoiser) -> Denoiser:
        if scale == 1:
            return denoiser

        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            told, untold = ask_together(denoiser, x, t, [condition, null_at(null, t, condition)])
            prediction = extrapolate(untold, told, scale)
            return rescaled(prediction, told, rescale, of) if rescale else prediction

        return guided

    return guide


def check_scale(scale: float) -> None:
    """Whether a guidance scale is a finite number.

    Raises:
        UserError: it is NaN or infinite.
    """
    if not math.isfinite(scale):
        raise UserError(f"the guidance scale must be a finite number, not {scale}.")


def null_at(null: Null, t: Time, condition: Condition) -> Condition:
    """The null condition at time t, on the condition's device and with its attention seam; what lies beside x (the
    small image of an up-sampler) is there either way, and with it the vector that tells its noise."""
    nothing = null(t) if callable(null) else null
    for tensor in condition.tensors().values():
        nothing = nothing.to(tensor.device)
    nothing = replace(nothing, attend=condition.attend)
    if condition.concat is None:
        return nothing
    kept = {name: getattr(condition, name) for name in ("concat", "vector") if getattr(nothing, name) is None}
    return replace(nothing, **kept)
