"""Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2), for any pair of times and any reverse variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser, Prediction
from carrara.process.schedules import Schedule
from carrara.process.transitions import Pair, floor_variance, learned_log_variance
from carrara.solvers.base import State, Step

Variance = Literal["small", "large", "learned", "optimal"]


@dataclass(frozen=True)
class Ancestral:
    """x_s = μ(x_t, x̂_0) + √Σ z; z = 0 on the pair that ends at the clean point.

    Pending classifier guidance moves the mean by Σ·gradient (Dhariwal & Nichol 2021, algorithm 1).

    Attributes:
        variance: "small" (σ²_post), "large" (σ²_{t|s}), "learned" (interpolated between the two for the pair
            that is walked), or "optimal" (σ²_post + (a_s σ²_{t|s}/s_t²)² Var[x_0|x_t], Bao et al. 2022, for
            denoisers that know the variance). None takes "learned" where the model gives it, else "small".
    """

    variance: Variance | None = None

    def __post_init__(self) -> None:
        if self.variance is not None and self.variance not in get_args(Variance):
            raise UserError(f"there is no variance '{self.variance}': {nearest(self.variance, get_args(Variance))}")

    def start(self, x: Tensor, grid: Grid) -> State:
        if grid.ascending:
            raise UserError("ancestral sampling walks from noise to image only: invert with DDIM.")
        return None  # the time before the pair, which the clean pair's variance needs (MATH §2)

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
        prediction = denoiser(x, t, condition)
        pair = Pair.of(schedule, t, s)
        mean = pair.posterior_mean(x, prediction.x0)
        clean = pair.s_s == 0
        if prediction.pending is None and clean:
            return Step(mean, prediction, t, s)
        variance = self._variance(schedule, t, s, state, prediction)
        if prediction.pending is not None:
            mean = mean + variance * prediction.pending
        if clean:
            return Step(mean, prediction, t, s)
        z = noise.like(x)
        if isinstance(variance, Tensor):
            return Step(torch.addcmul(mean, variance.sqrt(), z), prediction, t, s)
        return Step(torch.add(mean, z, alpha=variance**0.5), prediction, t, s)

    def _variance(
        self, schedule: Schedule, t: float, s: float, previous: float | None, prediction: Prediction
    ) -> float | Tensor:
        pair = Pair.of(schedule, t, s)
        fraction = prediction.variance_fraction
        kind = self.variance or ("small" if fraction is None else "learned")
        if kind == "small":
            return pair.posterior_variance
        if kind == "optimal":
            if prediction.x0_variance is None:
                raise UserError("variance='optimal' needs a denoiser that knows Var[x0|x_t], as the oracle does.")
            return pair.posterior_variance + pair.x0_coefficient**2 * prediction.x0_variance
        # Where the pair ends clean, "large" is the floor too: see `floor_variance`.
        floor = floor_variance(schedule, t, s, previous)
        if kind == "large":
            return floor if pair.s_s == 0 else pair.variance
        if fraction is None:
            raise UserError("variance='learned' needs a model that was trained with a learned variance.")
        return learned_log_variance(fraction, floor, pair.variance).exp()
