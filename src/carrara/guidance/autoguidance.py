"""Autoguidance: guiding a model with a bad version of itself (Karras et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from carrara.condition import Condition
from carrara.guidance.classifier_free import check_scale
from carrara.guidance.combine import extrapolate
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time


def autoguidance(scale: float, weak: Denoiser) -> Guide:
    """ε̂ = ε_weak + w (ε - ε_weak), both under the same condition; w = 1 is the model alone and costs one pass.

    Args:
        scale: w, any finite number.
        weak: a smaller or less trained model of the same data and schedule, as a denoiser.

    Raises:
        UserError: the scale is NaN or infinite.
    """
    check_scale(scale)

    def guide(denoiser: Denoiser) -> Denoiser:
        if scale == 1:
            return denoiser

        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            return extrapolate(weak(x, t, condition), denoiser(x, t, condition), scale)

        return guided

    return guide
