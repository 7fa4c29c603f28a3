"""Classifier guidance (Dhariwal & Nichol 2021, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.guidance.classifier_free import check_scale
from carrara.networks.slots import check_labels
from carrara.process.grids import Grid
from carrara.process.prediction import Denoiser, Guide, Prediction
from carrara.process.schedules import Schedule, Time
from carrara.process.transitions import Transition

Classifier = Callable[[Tensor, Time], Tensor]
"""`classifier(x, t) -> logits` [B, K], t in schedule time: `NoisyClassifier`, or the oracle's."""


def classifier_guidance(
    classifier: Classifier,
    scale: float,
    label: int | Tensor | None = None,
    form: Literal["score", "mean"] = "score",
    at: Literal["x", "mean"] = "x",
    schedule: Schedule | None = None,
    grid: Grid | None = None,
) -> Guide:
    """Guides toward p(x_t)·p(y|x_t)^w with g = ∇ log p(y|·), taken in float32 or more whatever the autocast.

    Args:
        classifier: trained on noisy images, at the original time whatever the grid.
        scale: w; 0 does not evaluate the classifier.
        label: y, one class for all, or int64 [B]; None takes the condition's target, or
            else its label.
        form: "score" (algorithm 2, for every solver): ε̂ ← ε̂ - w s g. "mean" (algorithm 1): w·g pends until the
            ancestral solver adds Σ·w·g to its mean; every other solver folds it into ε̂ as above.
        at: where g is taken: "x" is (x_t, t), as the authors' program does; "mean" is (μ, s), as the paper
            writes it: the posterior mean and the next time of the grid. The classifier is never evaluated at the
            clean point, but at the least noisy time instead.
        schedule, grid: of the integration, from which μ and s follow; for at = "mean" only.

    Raises:
        UserError: a scale that is NaN or infinite, an unknown word, a missing or unknown label or grid.
    """
    check_scale(scale)
    for key, word, known in (("form", form, ("score", "mean")), ("at", at, ("x", "mean"))):
        if word not in known:
            raise UserError(f"{key} is '{word}': {nearest(word, known)}", key=key, code="unknown")
    if (at == "mean") != (schedule is not None and grid is not None):
        raise UserError(
            "classifier guidance takes schedule and grid with at='mean', where it needs both.",
            key="grid",
            code="missing",
        )

    def guide(denoiser: Denoiser) -> Denoiser:
        if scale == 0:
            return denoiser

        def guided(x: Tensor, t: Time, condition: Condition) -> Prediction:
            prediction = denoiser(x, t, condition)
            at_x, time = x, t
            if schedule is not None and grid is not None:
                at_x, time = _mean(prediction, t, schedule, grid)
            gradient = scale * log_gradient(classifier, at_x, time, _labels(label, condition, x))
            if form == "score":
                return prediction.with_score(gradient)
            if prediction.pending is not None:
                gradient = gradient + prediction.pending
            return replace(prediction, pending=gradient)

        return guided

    return guide


def log_gradient(classifier: Classifier, x: Tensor, t: Time, labels: Tensor) -> Tensor:
    """∇_x log p(y|x) at time t, [B, …] in x's type; works inside `no_grad`, `inference_mode` and autocast.

    Raises:
        UserError: a label that the classifier does not know.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        dtype = x.dtype
        precise = torch.promote_types(x.dtype, torch.float32)
        x = x.detach().to(precise).clone().requires_grad_()
        logits = classifier(x, t)
        check_labels(labels, logits.shape[1])
        log_probability = logits.to(precise).log_softmax(dim=1).gather(1, labels[:, None])
        (gradient,) = torch.autograd.grad(log_probability.sum(), x)
    return gradient.to(dtype)


def _labels(label: int | Tensor | None, condition: Condition, x: Tensor) -> Tensor:
    if label is None:
        label = condition.label if condition.target is None else condition.target
    if label is None:
        raise UserError(
            "classifier guidance needs a class: give a label, or a condition with a target.",
            key="label",
            code="missing",
        )
    return torch.as_tensor(label, dtype=torch.int64, device=x.device).reshape(-1).expand(len(x))


def _mean(prediction: Prediction, t: Time, schedule: Schedule, grid: Grid) -> tuple[Tensor, Time]:
    """The posterior mean μ of the pair that starts at t (docs/math.md §2), and the time s of its end."""
    rising = torch.as_tensor(grid.times, dtype=torch.float64).sort().values
    now = torch.as_tensor(t, dtype=torch.float64).cpu()
    later = rising[(torch.searchsorted(rising, now) - 1).clamp(min=0)]  # the largest grid time below t
    transition = Transition.per_sample(schedule, now, later, prediction.x)
    return transition.posterior_mean(prediction.x, prediction.x0), later.clamp(min=schedule.first_time)
