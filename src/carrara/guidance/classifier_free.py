"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.guidance.combine import extrapolate, predictions, stacked
from carrara.guidance.rescale import Quantity, rescaled
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time

LARGEST_SCALE = 1e6
"""Of a guidance scale: beyond it predictions of order one lose all digits of the conditional model in float32."""


class HasNull(Protocol):
    """What knows the null form of a condition: a conditioner, or a model's `NullForm`."""

    def null(self, condition: Condition) -> Condition: ...


Null = Condition | Callable[[Time], Condition] | HasNull
"""The null condition, of one row or of the batch's; a function of t that returns it; or what derives it."""


def classifier_free(scale: float, null: Null, *, rescale: float = 0.0, of: Quantity = "eps") -> Guide:
    """ε̂ = ε_∅ + w (ε_c - ε_∅) (Ho & Salimans 2022, eq. 6, whose 1 + ω is w); w = 1 is the conditional model and costs
    one pass.

    Conditional and null rows share one call. Only the prediction is guided: a learned variance stays the
    conditional one. A negative condition (what should not be seen) takes the place of the null.

    Args:
        scale: w, any finite number.
        null: what guidance moves away from.
        rescale: φ in 0..1, see `carrara.guidance.rescale`.
        of: what φ is measured on.

    Raises:
        UserError: the scale is NaN or infinite, or φ lies outside 0..1.
    """
    check_scale(scale)
    if not 0 <= rescale <= 1:
        raise UserError(f"the guidance rescale must lie in 0..1, {rescale} does not.", key="rescale")

    def guide(denoiser: Denoiser) -> Denoiser:
        if scale == 1:
            return denoiser

        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            both = denoiser(*stacked(x, t, [condition, null_at(null, t, condition)]))
            cond, uncond = predictions(both, 2)
            prediction = extrapolate(uncond, cond, scale)
            return rescaled(prediction, cond, rescale, of) if rescale else prediction

        return guided

    return guide


def check_scale(scale: float) -> None:
    """Raises UserError unless a guidance scale is a number that float32 can multiply predictions by."""
    if not abs(scale) <= LARGEST_SCALE:
        raise UserError(
            f"the guidance scale must be a finite number of at most {LARGEST_SCALE:g}, not {scale}.", key="guidance"
        )


def null_at(null: Null, t: Time, condition: Condition) -> Condition:
    """The null condition at time t, on the condition's device, with its attention seam and target class."""
    if not isinstance(null, Condition):
        null = null(t) if callable(null) else null.null(condition)
    for tensor in condition.tensors().values():
        null = null.to(tensor.device)
    return replace(null, attend=condition.attend, target=condition.target)
