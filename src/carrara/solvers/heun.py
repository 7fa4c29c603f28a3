"""Heun's second-order method, deterministic and stochastic (Karras et al. 2022, algorithms 1 and 2).

In y = x/a and ρ = s/a the flow is dy/dρ = ε̂ for every schedule; Heun takes the mean of ε̂ at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser
from carrara.process.schedules import Schedule
from carrara.process.transitions import Pair
from carrara.solvers.base import State, Step
from carrara.solvers.euler import Euler, euler_step


@dataclass(frozen=True)
class Heun(Euler):
    """Euler's step, then its correction by ε̂ at the end: two evaluations a step, of order 2.

    Into the clean point and from zero SNR it is Euler's step, with one evaluation. With churn it is EDM's
    stochastic sampler (its ImageNet-64 setting: churn=40, s_min=0.05, s_max=50, s_noise=1.003).

    Attributes:
        churn, s_min, s_max, s_noise: as for `Euler`.
    """

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
        pair = Pair.of(schedule, t, s)
        arrived = euler_step(prediction, pair)
        if pair.a_t > 0 and pair.s_s > 0:
            eps = denoiser(arrived, s, condition).folded().eps
            change = pair.s_s - pair.s_t * (pair.a_s / pair.a_t)  # a_s (ρ_s - ρ_t)
            arrived = torch.add(arrived, eps - prediction.eps, alpha=change / 2)
        return Step(arrived, prediction, state, s)
