"""DDIM (Song et al. 2020, eq. 12 and 16), for any schedule and any pair of times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step


@dataclass(frozen=True)
class DDIM:
    """σ = η (s_s/s_t) σ_{t|s};  x_s = a_s x̂_0 + √(s_s² - σ²) ε̂ + σ z.

    η = 0 is deterministic and runs on a reversed grid too (DDIM inversion: ε̂ is predicted for the earlier image
    at the later time, docs/math.md §10); η = 1 is the DDPM posterior for every transition.

    Attributes:
        eta: 0..1.
        noise: "large" draws the noise with σ_{t|s} and keeps the direction of `eta`: with η = 1 it is the σ̂ row
            of the paper's tables.
    """

    eta: float = 0.0
    noise: Literal["matched", "large"] = "matched"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM's eta lies in 0..1, {self.eta:g} does not.", key="eta")
        if self.noise not in ("matched", "large"):
            raise UserError(f"DDIM's noise is 'matched' or 'large', not '{self.noise}'.", key="noise", code="unknown")

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.eta > 0 or self.noise == "large"

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return 1

    def start(self, x: Tensor, grid: Grid) -> State:
        if grid.ascending and self.stochastic:
            raise UserError(
                "a reversed grid needs a deterministic solver: DDIM with eta=0.", key="solver", code="unsupported"
            )
        return None

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        if transition.s > transition.t:
            return self._invert(denoise, transition, x)
        prediction = denoise(x, transition.t).folded()
        if transition.sigma_s == 0:
            return Step(transition.alpha_s * prediction.x0, prediction, None, transition.s)
        sigma = self.eta * math.sqrt(transition.posterior_variance)
        direction = math.sqrt(max(transition.sigma_s**2 - sigma**2, 0.0))
        x_s = torch.add(prediction.x0 * transition.alpha_s, prediction.eps, alpha=direction)
        if self.stochastic:
            scale = sigma if self.noise == "matched" else math.sqrt(transition.variance)
            x_s = torch.add(x_s, noise.like(x), alpha=scale)
        return Step(x_s, prediction, None, transition.s)

    def _invert(self, denoise: Denoise, transition: Transition[float], x: Tensor) -> Step:
        """The step run backwards, from the cleaner t up to the noisier s. ε̂ is predicted at the target level, where
        the network was trained, from the image as it is."""
        prediction = denoise(x, transition.s).folded()
        up = transition.reversed()
        change = up.sigma_t - up.alpha_ts * up.sigma_s
        return Step(torch.add(x * up.alpha_ts, prediction.eps, alpha=change), prediction, None, transition.s)
