"""Euler's method and Euler-ancestral (Karras et al. 2022, algorithm 2 without its correction; k-diffusion).

In y = x/a and ρ = s/a, the σ of EDM, the flow is dy/dρ = ε̂ for every schedule. Euler's step y + (ρ_s - ρ_t) ε̂ is
x_s = a_s x̂_0 + s_s ε̂: DDIM with η = 0. Euler-ancestral's σ_up and σ_down are DDIM's σ and √(s_s² - σ²) over a_s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser, Prediction
from carrara.process.schedules import Schedule, level
from carrara.process.transitions import Pair
from carrara.solvers.base import State, Step, needs_descent
from carrara.solvers.ddim import DDIM


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """k-diffusion's Euler-ancestral: DDIM under another name, its noise on by default.

    Attributes:
        eta: 0..1; 1 is the DDPM posterior for every pair.
    """

    eta: float = 1.0


def euler_step(prediction: Prediction, pair: Pair) -> Tensor:
    """x_s = a_s x̂_0 + s_s ε̂, which is x̂_0 itself at the clean point."""
    return torch.add(prediction.x0 * pair.a_s, prediction.eps, alpha=pair.s_s)


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
            raise UserError("churn needs churn ≥ 0, 0 ≤ s_min ≤ s_max and s_noise ≥ 0.")

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return len(grid)  # the number of steps that the churn is shared among

    def step(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        x: Tensor,
        t: float,
        s: float,
        condition: Condition,
        state: State,
        noise: Noise,
    ) -> Step:
        x, t = self.lift(schedule, x, t, state, noise)
        prediction = denoiser(x, t, condition).folded()
        return Step(euler_step(prediction, Pair.of(schedule, t, s)), prediction, state, s)

    def lift(self, schedule: Schedule, x: Tensor, t: float, steps: int, noise: Noise) -> tuple[Tensor, float]:
        """x and t after the churn; themselves where there is none."""
        a, s = level(schedule, t)
        if self.churn == 0 or a == 0 or not self.s_min <= s / a <= self.s_max:
            return x, t
        wanted = s / a * (1 + min(self.churn / steps, math.sqrt(2) - 1))
        lifted = float(schedule.time_at(-2 * math.log(wanted)))
        if lifted <= t:
            return x, t
        a_new, s_new = level(schedule, lifted)
        added = math.sqrt(max(s_new**2 - (a_new / a * s) ** 2, 0.0))
        return torch.add(x * (a_new / a), noise.like(x), alpha=self.s_noise * added), lifted
