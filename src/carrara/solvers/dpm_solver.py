"""DPM-Solver++ (Lu et al. 2022), multistep, in the data-prediction form.

With ℓ = ln(a/s), half the log-SNR, h = ℓ_s - ℓ_t: x_s = (s_s/s_t) x_t - a_s (e^{-h} - 1) D, D a combination of the last
predictions. e^{-h} is computed as the ratio (s_s a_t)/(s_t a_s), so that the clean point (h = ∞) needs no exception.
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
from carrara.process.prediction import Denoiser
from carrara.process.schedules import Schedule
from carrara.process.transitions import Pair
from carrara.solvers.base import State, Step


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ of order 1 (which is DDIM with η = 0) or 2 ("2M").

    The first step, and the step into the clean point, are of order 1.

    Attributes:
        order: 1 or 2.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise UserError(f"DPM-Solver++ multistep has the orders 1 and 2, not {self.order}.")

    def start(self, x: Tensor, grid: Grid) -> State:
        if grid.ascending:
            raise UserError("a multistep solver cannot invert: use DDIM on the reversed grid.")
        return ()  # ((time, x̂_0), …) of the last steps, newest first

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
        prediction = denoiser(x, t, condition).folded()
        pair = Pair.of(schedule, t, s)
        history = ((t, prediction.x0), *state)[: self.order]
        decay = (pair.s_s * pair.a_t) / (pair.s_t * pair.a_s)  # e^{-h}
        data = prediction.x0
        if len(history) == 2 and decay > 0:
            before, earlier = history[1]
            last = Pair.of(schedule, before, t)
            ratio = (
                math.log(last.s_s * last.a_t / (last.s_t * last.a_s)) / math.log(decay) if last.a_t > 0 else math.inf
            )
            data = torch.lerp(data, earlier, -1 / (2 * ratio))
        arrived = torch.add(x * (pair.s_s / pair.s_t), data, alpha=pair.a_s * (1 - decay))
        return Step(arrived, prediction, history, s)
