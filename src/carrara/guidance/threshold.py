"""Keeping the predicted clean image in range. For pixels only: latents have no such range."""

from __future__ import annotations

from torch import Tensor

from carrara.condition import Condition
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time


def static_threshold(bound: float = 1.0) -> Guide:
    """x̂_0 clamped to [-bound, bound], ε̂ derived again from it (Ho et al. 2020's programs; "clip_denoised")."""

    def guide(denoiser: Denoiser) -> Denoiser:
        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            prediction = denoiser(x, t, condition)
            return prediction.with_x0(prediction.x0.clamp(-bound, bound))

        return guided

    return guide
