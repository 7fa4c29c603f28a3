"""Heun's second-order method, deterministic and stochastic (Karras et al. 2022, algorithms 1 and 2).

In y = x/a and ρ = s/a the flow is dy/dρ = ε̂ for every schedule; Heun takes the mean of ε̂ at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.process.noise import Noise
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step
from carrara.solvers.euler import Euler, euler_step


@dataclass(frozen=True)
class Heun(Euler):
    """Euler's step, then its correction by ε̂ at the end: two evaluations a step, of order 2.

    Into the clean point and from zero SNR it is Euler's step, with one evaluation. With churn it is EDM's
    stochastic sampler (its ImageNet-64 setting: churn=40, s_min=0.05, s_max=50, s_noise=1.003).

    Attributes:
        churn, s_min, s_max, s_noise: as for `Euler`.
    """

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return 2

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        x, transition = self.lift(transition, x, state, noise)
        prediction = denoise(x, transition.t).folded()
        x_s = euler_step(prediction, transition)
        if transition.alpha_t > 0 and transition.sigma_s > 0:
            eps = denoise(x_s, transition.s).folded().eps
            change = transition.sigma_s - transition.sigma_t * (
                transition.alpha_s / transition.alpha_t
            )  # a_s (ρ_s - ρ_t)
            x_s = torch.add(x_s, eps - prediction.eps, alpha=change / 2)
        return Step(x_s, prediction, state, transition.s)
