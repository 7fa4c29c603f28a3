"""Guidance rescale (Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", eq. 15-16)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from carrara.process.prediction import Prediction

Quantity = Literal["eps", "x0", "v"]


def rescaled(guided: Prediction, plain: Prediction, fraction: float, of: Quantity = "eps") -> Prediction:
    """Strong guidance widens the values; this restores a fraction φ of their standard deviation.

    The factor is φ·std(plain)/std(guided) + 1 - φ, the standard deviation per sample over C, H, W.

    Args:
        guided: after guidance.
        plain: the conditional prediction before it, for the same x.
        fraction: φ, 0 (no change) to 1 (the conditional prediction's standard deviation).
        of: what is measured and multiplied. The paper has "the model's output": "eps" for an ε-model, "v" for
            a v-model, "x0" for the clean image's own contrast.
    """
    before, after = _quantity(plain, of), _quantity(guided, of)
    dims = tuple(range(1, after.ndim))
    ratio = before.std(dim=dims, keepdim=True) / after.std(dim=dims, keepdim=True)
    changed = after * (fraction * ratio + (1 - fraction))
    if of == "eps":
        return guided.with_eps(changed)
    if of == "x0":
        return guided.with_x0(changed)
    alpha, sigma = guided.alpha, guided.sigma
    return guided.with_x0((alpha * guided.x - sigma * changed) / (alpha**2 + sigma**2))


def _quantity(prediction: Prediction, of: Quantity) -> Tensor:
    if of == "v":
        return prediction.alpha * prediction.eps - prediction.sigma * prediction.x0
    return torch.as_tensor(getattr(prediction, of))
