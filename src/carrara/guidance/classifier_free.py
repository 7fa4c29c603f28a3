"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time


def classifier_free(scale: float, null: Condition | Callable[[Time], Condition]) -> Guide:
    """ε̂ = ε_∅ + w (ε_c - ε_∅): w = 1 is the plain conditional model and costs one pass; the paper's 1 + ω is w.

    Conditional and null rows share one call. Only ε is guided: a learned variance stays the conditional one.

    Args:
        scale: w, any finite number.
        null: the condition of "nothing said", one row or the batch's; or a function of t that gives it.

    Raises:
        UserError: the scale is NaN or infinite.
    """
    if not math.isfinite(scale):
        raise UserError(f"the guidance scale must be a finite number, not {scale}.")

    def guide(denoiser: Denoiser) -> Denoiser:
        if scale == 1:
            return denoiser

        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            size = len(x)
            nothing = null(t) if callable(null) else null
            nothing = replace(nothing.to(x.device), attend=condition.attend)
            both = Condition.join([condition.batch(size), nothing.batch(size)])
            time = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
            prediction = denoiser(torch.cat([x, x]), time, both)
            told, untold = prediction.eps.chunk(2)
            eps = torch.lerp(untold, told, scale)
            return _half(prediction, size).with_eps(eps)

        return guided

    return guide


def _half(prediction: Prediction, size: int) -> Prediction:
    """The first `size` rows of a prediction."""

    def rows(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:size]

    def scale(value: float | Tensor) -> float | Tensor:
        return value[:size] if isinstance(value, Tensor) and value.ndim and len(value) > 1 else value

    return Prediction(
        prediction.x[:size],
        scale(prediction.alpha),
        scale(prediction.sigma),
        prediction.x0[:size],
        prediction.eps[:size],
        rows(prediction.variance_fraction),
        rows(prediction.pending),
        rows(prediction.x0_variance),
    )
