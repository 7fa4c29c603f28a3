"""Several conditions at once (Liu et al. 2022, "Compositional visual generation with composable diffusion")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.guidance.classifier_free import Null, check_scale, null_at
from carrara.guidance.combine import predictions, stacked
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Time


def compose(scale: float, others: Sequence[tuple[float, Condition]], null: Null) -> Guide:
    """ε̂ = ε_∅ + w (ε_c - ε_∅) + Σ_i w_i (ε_i - ε_∅), c the requested condition, i the others; one call for all.

    The product of the conditions' densities, each to its power; a negative weight moves away from one. With no
    others it is classifier-free guidance.

    Args:
        scale: w, of the condition that the denoiser is called with.
        others: (w_i, condition i), each of one row or of the batch's.
        null: what guidance moves away from.

    Raises:
        UserError: a weight is NaN or infinite, or there are no others.
    """
    for weight in (scale, *(weight for weight, _ in others)):
        check_scale(weight)
    if not others:
        raise UserError(
            "composing needs at least one condition more: use classifier_free for a single one.",
            key="others",
            code="missing",
        )

    def guide(denoiser: Denoiser) -> Denoiser:
        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            more = [
                replace(other.to(x.device), attend=condition.attend, target=condition.target) for _, other in others
            ]
            conditions = [condition, null_at(null, t, condition), *more]
            together = denoiser(*stacked(x, t, conditions))
            cond, uncond, *rest = predictions(together, len(conditions))
            eps, x0 = uncond.eps, uncond.x0
            for weight, one in zip((scale, *(w for w, _ in others)), (cond, *rest), strict=True):
                eps = eps + weight * (one.eps - uncond.eps)
                x0 = x0 + weight * (one.x0 - uncond.x0)
            return replace(cond, eps=eps, x0=x0)

        return guided

    return guide
