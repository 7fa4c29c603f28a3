"""The diffusion objective L_simple (Ho et al. 2020, eq. 14), for any prediction kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.objectives.base import Examples, Terms
from carrara.objectives.times import TimeSampler, UniformTimes, draw_uniform
from carrara.process.denoiser import network_times
from carrara.process.noise import Noise
from carrara.process.parameterisation import Predicts
from carrara.process.prediction import scales
from carrara.process.schedules import Schedule

# The draws of one training step, told apart by their sub-draw.
_NOISE, _TIME, _DROPOUT = 0, 1, 2


class DiffusionObjective:
    """Mean over dimensions of (target - network(a x_0 + s ε, t))², target being what the network predicts.

    Args:
        network: `network(x, network_time, condition) -> raw` [B, C, H, W].
        schedule: the noise levels.
        predicts: "eps", "x0" or "v".
        times: which levels are visited.
        null: the condition of a dropped sample, one row; None trains without condition dropout.
        dropout: probability with which each sample's condition is dropped (Ho & Salimans 2022 use 0.1).
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        predicts: Predicts = "eps",
        times: TimeSampler | None = None,
        null: Condition | None = None,
        dropout: float = 0.0,
    ) -> None:
        if not 0 <= dropout < 1:
            raise UserError(f"the condition dropout lies in 0..1, {dropout:g} does not.")
        if dropout > 0 and null is None:
            raise UserError("condition dropout needs a null condition to drop to.")
        self.network, self.schedule, self.predicts = network, schedule, predicts
        self.times = times or UniformTimes()
        self.null, self.dropout = null, dropout

    @property
    def players(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        x0, size = batch.x0, batch.x0.shape[0]
        times, weights = self.times.draw(self.schedule, draw_uniform(draw, size, _TIME))
        eps = draw.like(x0, sub=_NOISE)
        alpha, sigma = scales(self.schedule, times, x0)
        x = alpha * x0 + sigma * eps
        raw = self.network(x, network_times(self.schedule, times, x), self._condition(batch.condition, draw, size))
        error = (raw.to(x0.dtype) - self._target(x0, eps, alpha, sigma)).square().flatten(1).mean(1)
        share = (times - self.schedule.first_time) / (self.schedule.final_time - self.schedule.first_time)
        quarter = (share * 4).long().clamp(0, 3)
        return Terms(error * weights.to(error), {"mse": error.detach()}, quarter)

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        if self.predicts == "eps":
            return eps
        if self.predicts == "x0":
            return x0
        return alpha * eps - sigma * x0

    def _condition(self, condition: Condition, draw: Noise, size: int) -> Condition:
        if self.null is None or self.dropout == 0:
            return condition
        keep = draw_uniform(draw, size, _DROPOUT) >= self.dropout
        return condition.mix(keep, self.null)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise UserError(f"this objective remembers nothing, the checkpoint holds {sorted(state)}.")
