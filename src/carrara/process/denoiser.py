"""A network as a denoiser, and a classifier of noisy images: the only two that know the network's own time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.devices import HALF, to_device
from carrara.errors import UserError, nearest
from carrara.process.parameterisation import SIGMA_DATA, Predicts, network_input, to_prediction
from carrara.process.prediction import Prediction, scales
from carrara.process.schedules import Discrete, Schedule, Time

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""`network(x, network_time, condition) -> raw`, raw of x's shape or with twice its channels."""


def network_times(schedule: Schedule, t: Time, x: Tensor) -> Tensor:
    """The network's own time at t: [B] on x's device, float64 where x is, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return to_device(schedule.network_time(t), x.device, dtype).expand(x.shape[0])


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network, its schedule, and what it predicts.

    Attributes:
        network: `network(x, network_time, condition) -> raw`.
        schedule: the noise levels, and the network's own time.
        predicts: "eps", "x0", "v" (v = a ε - s x_0), "flow" (u = ε - x_0), "edm" (the network sees c_in·x/a and
            predicts EDM's F), or "previous" (the mean of x_{t-1}, discrete schedules at whole times only); see
            `parameterisation`.
        learned_variance: the network gives 2C channels, the second half being the raw variance fraction.
        sigma_data: EDM's σ_data, the standard deviation of the clean data.

    Raises:
        UserError: an unknown `predicts`; an output whose channels are not C (2C with a learned variance).
    """

    network: Network
    schedule: Schedule
    predicts: Predicts = "eps"
    learned_variance: bool = False
    sigma_data: float = SIGMA_DATA

    def __post_init__(self) -> None:
        if self.predicts not in get_args(Predicts):
            raise UserError(
                f"a network cannot predict '{self.predicts}': {nearest(self.predicts, get_args(Predicts))}",
                key="predicts",
                code="unknown",
            )
        if self.predicts == "previous" and not isinstance(self.schedule, Discrete):
            raise UserError(
                "a network that predicts the previous image needs the discrete schedule it was trained on.",
                key="schedule",
                code="unsupported",
            )

    def raw(self, x: Tensor, t: Time, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """What the network predicts, in x's type: [B, …], and its raw variance fraction, if it has one."""
        return self._split(x, self.network(*self._arguments(x, t, condition)))

    def _arguments(self, x: Tensor, t: Time, condition: Condition) -> tuple[Tensor, Tensor, Condition]:
        """What the network is called with; the target of classifier guidance is not for it."""
        scaled = network_input(self.predicts, x, *scales(self.schedule, t, x), self.sigma_data)
        if isinstance(self.network, nn.Module):
            kept = next((weight.dtype for weight in self.network.parameters()), x.dtype)
            scaled = scaled.to(kept) if kept in HALF else scaled
        condition = condition if condition.target is None else replace(condition, target=None)
        return scaled, network_times(self.schedule, t, x), condition

    def _split(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = raw.to(x.dtype)
        expected = x.shape[1] * (2 if self.learned_variance else 1)
        if raw.shape[1] != expected:
            raise UserError(
                f"the network gave {raw.shape[1]} channels for an image of {x.shape[1]}: {expected} are expected "
                f"{'with' if self.learned_variance else 'without'} a learned variance.",
                key="network",
                code="shape",
            )
        if not self.learned_variance:
            return raw, None
        output, fraction = raw.chunk(2, dim=1)
        return output, fraction

    def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
        # called here rather than through `raw`: as few frames as possible stand between `sample` and the network
        output, fraction = self._split(x, self.network(*self._arguments(x, t, condition)))
        return to_prediction(self.predicts, self.schedule, x, t, output, fraction, self.sigma_data)


@dataclass(frozen=True)
class NoisyClassifier:
    """A classifier that was trained on noisy images: `(x, t) -> logits` [B, K], t in schedule time.

    Its network always gets the original time, whatever the grid (docs/math.md §6).

    Attributes:
        network: `network(x, network_time, condition) -> logits` [B, K].
        schedule: the schedule that the classifier was trained for.
    """

    network: Network
    schedule: Schedule

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return self.network(x, network_times(self.schedule, t, x), Condition())
