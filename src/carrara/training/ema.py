"""The running mean of the weights, which is what samples are made from (Ho et al. 2020, appendix B)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A float32 shadow of a module: m ← d m + (1 - d) w once per optimiser step.

    The decay d is `decay`, but (1 + step)/(10 + step) in early steps where that is smaller, so that the initial
    weights are forgotten. Buffers are copied, not averaged.

    Attributes:
        module: a copy of the module that holds the mean, in evaluation mode and without gradients.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = [p.detach().float() for p in module.parameters()]
        torch._foreach_lerp_(mean, weights, 1 - decay)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)
