"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from carrara.recipe import Training


def learning_rate(training: Training, step: int) -> float:
    """The learning rate of optimiser step `step` (from 0): a linear warm-up, then the chosen decay.

    "cosine" falls from the full rate after the warm-up to 0 behind the last step (Loshchilov & Hutter 2016);
    "inverse_sqrt" falls as √(warmup/step) (Vaswani et al. 2017).
    """
    full, warmup = training.learning_rate, training.warmup
    if step < warmup:
        return full * (step + 1) / warmup
    if training.decay == "constant":
        return full
    if training.decay == "inverse_sqrt":
        return full * math.sqrt(max(warmup, 1) / (step + 1))
    share = (step - warmup) / max(training.steps - warmup, 1)
    return full * (1 + math.cos(math.pi * share)) / 2
