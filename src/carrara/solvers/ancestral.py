"""Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2), for any pair of times and any reverse variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from carrara.errors import UserError, nearest
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Prediction
from carrara.process.transitions import ReverseVariance, Transition, chosen_variance, learned_log_variance
from carrara.solvers.base import Denoise, State, Step, needs_descent


@dataclass(frozen=True)
class Ancestral:
    """x_s = μ(x_t, x̂_0) + √Σ z; z = 0 on the pair that ends at the clean point.

    Pending classifier guidance moves the mean by Σ·gradient (Dhariwal & Nichol 2021, algorithm 1).

    Attributes:
        variance: see `ReverseVariance`; None takes "learned" where the model predicts it, else "small".
    """

    variance: ReverseVariance | None = None

    def __post_init__(self) -> None:
        if self.variance is not None and self.variance not in get_args(ReverseVariance):
            known = nearest(self.variance, get_args(ReverseVariance))
            raise UserError(f"there is no variance '{self.variance}': {known}", key="variance", code="unknown")

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return True

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return 1

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return None

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        prediction = denoise(x, transition.t)
        mean = transition.posterior_mean(x, prediction.x0)
        clean = transition.sigma_s == 0
        if prediction.pending is None and clean:
            return Step(mean, prediction, None, transition.s)
        variance = self._variance(transition, prediction)
        if prediction.pending is not None:
            mean = mean + variance * prediction.pending
        if clean:
            return Step(mean, prediction, None, transition.s)
        z = noise.like(x)
        if isinstance(variance, Tensor):
            return Step(torch.addcmul(mean, variance.sqrt(), z), prediction, None, transition.s)
        return Step(torch.add(mean, z, alpha=variance**0.5), prediction, None, transition.s)

    def _variance(self, transition: Transition[float], prediction: Prediction) -> float | Tensor:
        kind = chosen_variance(self.variance, prediction)
        if kind == "small":
            return transition.posterior_variance
        if kind == "optimal":
            assert prediction.x0_variance is not None
            return transition.posterior_variance + transition.x0_coefficient**2 * prediction.x0_variance
        floor = transition.floor_variance()
        if kind == "large":  # into the clean point "large" is the floor too, as in guided-diffusion
            return floor if transition.sigma_s == 0 else transition.variance
        assert prediction.variance_fraction is not None
        return learned_log_variance(prediction.variance_fraction, floor, transition.variance).exp()
