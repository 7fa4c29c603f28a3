"""DDIM (Song et al. 2020, eq. 12 and 16), for any schedule and any pair of times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser
from carrara.process.schedules import Schedule
from carrara.process.transitions import Pair
from carrara.solvers.base import State, Step


@dataclass(frozen=True)
class DDIM:
    """σ = η (s_s/s_t) σ_{t|s};  x_s = a_s x̂_0 + √(s_s² - σ²) ε̂ + σ z.

    η = 0 is deterministic and runs on a reversed grid too (DDIM inversion: ε̂ is asked for the earlier image
    at the later time, MATH §10); η = 1 is the DDPM posterior for every pair.

    Attributes:
        eta: 0..1.
        noise: "large" draws the noise with σ_{t|s} and keeps the direction of `eta`: with η = 1 it is the σ̂ row
            of the paper's tables.
    """

    eta: float = 0.0
    noise: Literal["matched", "large"] = "matched"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM's eta lies in 0..1, {self.eta:g} does not.")
        if self.noise not in ("matched", "large"):
            raise UserError(f"DDIM's noise is 'matched' or 'large', not '{self.noise}'.")

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.eta > 0 or self.noise == "large"

    def start(self, x: Tensor, grid: Grid) -> State:
        if grid.ascending and self.stochastic:
            raise UserError("a reversed grid needs a deterministic solver: DDIM with eta=0.")
        return None

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
        if s > t:
            return self._invert(denoiser, schedule, x, t, s, condition)
        prediction = denoiser(x, t, condition).folded()
        pair = Pair.of(schedule, t, s)
        if pair.s_s == 0:
            return Step(pair.a_s * prediction.x0, prediction, None, s)
        spread = self.eta * math.sqrt(pair.posterior_variance)
        direction = math.sqrt(max(pair.s_s**2 - spread**2, 0.0))
        arrived = torch.add(prediction.x0 * pair.a_s, prediction.eps, alpha=direction)
        if self.stochastic:
            scale = spread if self.noise == "matched" else math.sqrt(pair.variance)
            arrived = torch.add(arrived, noise.like(x), alpha=scale)
        return Step(arrived, prediction, None, s)

    def _invert(
        self, denoiser: Denoiser, schedule: Schedule, x: Tensor, t: float, s: float, condition: Condition
    ) -> Step:
        """The step run backwards, from the cleaner t up to the noisier s. ε̂ is asked at the target level, where
        the network was trained; x̂_0 is what it makes of the image as it stands."""
        asked = denoiser(x, s, condition).folded()
        pair = Pair.of(schedule, s, t)
        change = pair.s_t - pair.step * pair.s_s
        return Step(torch.add(x * pair.step, asked.eps, alpha=change), asked, None, s)
