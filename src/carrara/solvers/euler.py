"""Euler's method and Euler-ancestral (Karras et al. 2022, algorithm 2 without its correction; k-diffusion).

In y = x/a and ρ = s/a, the σ of EDM, the flow is dy/dρ = ε̂ for every schedule. Euler's step y + (ρ_s - ρ_t) ε̂ is
x_s = a_s x̂_0 + s_s ε̂: DDIM with η = 0. Euler-ancestral's σ_up and σ_down are DDIM's σ and √(s_s² - σ²) over a_s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Prediction
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step, needs_descent
from carrara.solvers.ddim import DDIM


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """k-diffusion's Euler-ancestral: DDIM under another name, its noise on by default.

    Attributes:
        eta: 0..1; 1 is the DDPM posterior for every transition.
    """

    eta: float = 1.0


def euler_step(prediction: Prediction, transition: Transition[float]) -> Tensor:
    """x_s = α_s x̂_0 + σ_s ε̂, which is x̂_0 itself at the clean point."""
    return torch.add(prediction.x0 * transition.alpha_s, prediction.eps, alpha=transition.sigma_s)


@dataclass(frozen=True)
class Euler:
    """Euler's method in EDM's variables, with EDM's churn. Without churn it is DDIM with η = 0.

    With churn, x is first made noisier (Karras et al. 2022, algorithm 2, lines 4-6), on any schedule: from ρ to
    ρ̂ = ρ (1 + min(churn/steps, √2 - 1)) where s_min ≤ ρ ≤ s_max, but not beyond the schedule's noisiest level.

    Attributes:
        churn: S_churn; 0 is deterministic.
        s_min, s_max: the range of ρ = s/a in which noise is added.
        s_noise: scales the added noise.
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.churn < 0 or not 0 <= self.s_min <= self.s_max or self.s_noise < 0:
            raise UserError("churn needs churn ≥ 0, 0 ≤ s_min ≤ s_max and s_noise ≥ 0.", key="churn")

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.churn > 0

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return len(grid)  # the number of steps that the churn is shared among

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        x, transition = self.lift(transition, x, state, noise)
        prediction = denoise(x, transition.t).folded()
        return Step(euler_step(prediction, transition), prediction, state, transition.s)

    def lift(
        self, transition: Transition[float], x: Tensor, steps: int, noise: Noise
    ) -> tuple[Tensor, Transition[float]]:
        """x and the transition after the churn; themselves where there is none."""
        schedule, alpha, sigma = transition.schedule, transition.alpha_t, transition.sigma_t
        if self.churn == 0 or alpha == 0 or not self.s_min <= sigma / alpha <= self.s_max:
            return x, transition
        rho = sigma / alpha * (1 + min(self.churn / steps, math.sqrt(2) - 1))
        t = float(schedule.time_at(-2 * math.log(rho)))
        if t <= transition.t:
            return x, transition
        lifted = Transition.of(schedule, t, transition.s)
        ratio = lifted.alpha_t / alpha
        added = math.sqrt(max(lifted.sigma_t**2 - (ratio * sigma) ** 2, 0.0))
        return torch.add(x * ratio, noise.like(x), alpha=self.s_noise * added), lifted
