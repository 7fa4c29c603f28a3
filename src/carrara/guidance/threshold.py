"""Keeping the predicted clean image in range. For pixels only: latents have no such range.

What is not finite is not clamped, so that `integrate` finds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time


def static_threshold(bound: float = 1.0) -> Guide:
    """x̂_0 clamped to [-bound, bound], ε̂ derived again from it (Ho et al. 2020's programs; "clip_denoised").

    Raises:
        UserError: the bound is not a positive number.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise UserError(f"a threshold's bound must be a positive number, not {bound}.", key="bound")

    def guide(denoiser: Denoiser) -> Denoiser:
        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            prediction = denoiser(x, t, condition)
            x0 = prediction.x0
            return prediction.with_x0(torch.where(x0.isfinite(), x0.clamp(-bound, bound), x0))

        return guided

    return guide


def dynamic_threshold(percentile: float = 0.995, bound: float = 1.0) -> Guide:
    """x̂_0 clamped to [-s, s] and divided by s/bound, s the percentile of |x̂_0| per sample, at least `bound`
    (Saharia et al. 2022, "Imagen", section 2.3).

    Raises:
        UserError: the percentile lies outside 0..1, or the bound is not a positive number.
    """
    if not 0 < percentile <= 1:
        raise UserError(f"a percentile lies in 0..1, {percentile} does not.", key="percentile")
    if not (math.isfinite(bound) and bound > 0):
        raise UserError(f"a threshold's bound must be a positive number, not {bound}.", key="bound")

    def guide(denoiser: Denoiser) -> Denoiser:
        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            prediction = denoiser(x, t, condition)
            x0 = prediction.x0
            # one sample at a time: `quantile` refuses more than 2^24 values
            reach = torch.stack([row.abs().flatten().float().quantile(percentile) for row in x0])
            reach = reach.to(x0.dtype).clamp(min=bound).reshape(-1, *[1] * (x0.ndim - 1))
            clamped = torch.minimum(torch.maximum(x0, -reach), reach) * (bound / reach)
            return prediction.with_x0(torch.where(x0.isfinite(), clamped, x0))

        return guided

    return guide
