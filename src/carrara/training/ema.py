"""Running means of the weights, which is what samples are made from (Ho et al. 2020, appendix B)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carrara.distributed import local
from carrara.recipe import Training


@dataclass(frozen=True)
class Exponential:
    """The usual mean: `decay`, but (1 + step)/(10 + step) in early steps where that is smaller, so that the initial
    weights are forgotten."""

    decay: float

    def __call__(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class PowerFunction:
    """EDM2's mean: after t steps the weights of step τ count as τ^γ (Karras et al. 2023, "Analyzing and Improving
    the Training Dynamics of Diffusion Models", §3.1).

    Attributes:
        sigma_rel: the width of that profile relative to t, below 1/√12.
    """

    sigma_rel: float

    @property
    def gamma(self) -> float:
        """γ, the largest root of σ_rel² (γ + 2)² (γ + 3) = γ + 1 (ibid., §3.1 and appendix C)."""
        w = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - w, 12 - w]).real.max())

    def __call__(self, step: int) -> float:
        """β = (1 - 1/t)^(γ + 1), under which ∫ τ^γ θ(τ) dτ / ∫ τ^γ dτ is kept exactly for weights that are
        constant within a step."""
        return math.pow(1 - 1 / step, self.gamma + 1)


class EMA:
    """A float32 shadow of a module: m ← d m + (1 - d) w once per optimiser step. Buffers are copied, not averaged.

    Args:
        module: whose weights are averaged.
        decay: d as a function of the optimiser step, from 1.

    Attributes:
        module: a copy of the module that holds the mean, in evaluation mode and without gradients.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, taken: Tensor | None = None) -> None:
        """Update the mean after optimiser step `step` (from 1).

        Args:
            taken: bool [], whether the step was taken; the mean stays where it was not. Default: it was.
        """
        mean: list[Tensor] = [local(p) for p in self.module.parameters()]
        weights: list[Tensor] = [local(p.detach()).float() for p in module.parameters()]
        weight: Any = 1 - self.decay(step)
        # A tensor for each weight keeps the decision on the device.
        torch._foreach_lerp_(mean, weights, weight if taken is None else [torch.where(taken, weight, 0.0)] * len(mean))
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)


def decays_of(training: Training) -> dict[str, Callable[[int], float]]:
    """The means that a recipe names, by the names of their files; samples are made from "ema"."""
    first, *others = training.decays
    decays: dict[str, Callable[[int], float]] = {"ema": Exponential(first)}
    decays |= {f"ema-{decay:g}": Exponential(decay) for decay in others}
    return decays | {f"power-{width:g}": PowerFunction(width) for width in training.power_ema}
