"""The arithmetic that guides have in common: predictions for one x, combined with weights that sum to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process.prediction import Prediction
from carrara.process.schedules import Time


def extrapolate(base: Prediction, target: Prediction, weight: float | Tensor) -> Prediction:
    """base + weight·(target - base), in ε̂ and x̂_0 alike; all else (a learned variance) is the target's.

    Both are moved, rather than x̂_0 derived from ε̂, so that it holds where no signal is left (a = 0).

    Args:
        base, target: predictions for the same x at the same time.
        weight: 0 is the base, 1 the target; a number, or a tensor that broadcasts against x.
    """
    return replace(target, eps=torch.lerp(base.eps, target.eps, weight), x0=torch.lerp(base.x0, target.x0, weight))


def stacked(x: Tensor, t: Time, conditions: Sequence[Condition]) -> tuple[Tensor, Time, Condition]:
    """The arguments of one call for x [B, …] under several conditions, all rows one after the other.

    Args:
        x, t: see `Denoiser`.
        conditions: each of one row or of B rows.
    """
    size, count = len(x), len(conditions)
    joined = Condition.join([condition.batch(size) for condition in conditions])
    time = t.repeat(count) if isinstance(t, Tensor) and t.ndim else t
    return torch.cat([x] * count), time, joined


def predictions(prediction: Prediction, count: int) -> list[Prediction]:
    """What one call on `stacked` arguments predicted, condition by condition."""
    size = len(prediction.x) // count
    return [_rows(prediction, slice(i * size, (i + 1) * size)) for i in range(count)]


def _rows(prediction: Prediction, rows: slice) -> Prediction:
    """Some rows of a prediction; what is one for the whole batch stays."""
    total = len(prediction.x)
    values = {field.name: getattr(prediction, field.name) for field in fields(prediction)}
    taken = {
        name: value[rows]
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == total
    }
    return replace(prediction, **taken)
