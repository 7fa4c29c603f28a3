"""Guidance in a limited interval (Kynkäänniemi et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.guidance.combine import extrapolate
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time


def interval(guide: Guide, low: float, high: float) -> Guide:
    """Another guide at times in (low, high]; the plain denoiser at all others.

    The paper names noise levels σ/a; `schedule.time_at(-2 ln(σ/a))` is their time. Outside the interval only the
    plain conditional pass is paid for.

    Args:
        guide: the rule to limit, e.g. `classifier_free(…)`.
        low, high: schedule times.

    Raises:
        UserError: the interval is empty.
    """
    if not low < high:
        raise UserError(f"the guidance interval ({low}, {high}] is empty.", key="interval")

    def limited(denoiser: Denoiser) -> Denoiser:
        guided = guide(denoiser)

        def choose(x: Tensor, t: Time, condition: Condition) -> Prediction:
            times = torch.as_tensor(t)
            inside = (times > low) & (times <= high)
            if bool(inside.all()):
                return guided(x, t, condition)
            plain = denoiser(x, t, condition)
            if not bool(inside.any()):
                return plain
            weight = inside.to(x).reshape(-1, *[1] * (x.ndim - 1))
            return extrapolate(plain, guided(x, t, condition).folded(), weight)

        return choose

    return limited
