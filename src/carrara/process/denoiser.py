"""A network as a denoiser, and a classifier of noisy images: the only two that know the network's own time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.process.prediction import Prediction, Scale, scales
from carrara.process.schedules import Discrete, Schedule, Time

Predicts = Literal["eps", "x0", "v", "flow", "edm", "previous"]
Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""`network(x, network_time, condition) -> raw`, raw of x's shape or with twice its channels."""

SIGMA_DATA = 0.5
"""EDM's σ_data, the standard deviation of the data that its preconditioning presumes (Karras et al. 2022)."""


def _spread(alpha: Scale, sigma: Scale) -> Scale:
    """√(s² + a² σ_data²): the standard deviation of x_t that EDM's preconditioning presumes."""
    spread: Scale = (sigma**2 + (alpha * SIGMA_DATA) ** 2) ** 0.5
    return spread


def network_times(schedule: Schedule, t: Time, x: Tensor) -> Tensor:
    """What the network is told at time t: [B] on x's device, float64 where x is, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return schedule.network_time(t).to(device=x.device, dtype=dtype).expand(x.shape[0])


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network, its schedule, and what it predicts.

    Attributes:
        network: `network(x, network_time, condition) -> raw`.
        schedule: tells the noise level at t and what the network is told.
        predicts: "eps", "x0", "v" (v = a ε - s x_0), "flow" (u = ε - x_0), "edm" (the network sees c_in·x/a and
            tells EDM's F), or "previous" (the mean of x_{t-1}, discrete schedules at whole times only).
        learned_variance: the network gives 2C channels, the second half being the raw variance fraction.

    Raises:
        UserError: an unknown `predicts`; an output whose channels are not C (2C with a learned variance).
    """

    network: Network
    schedule: Schedule
    predicts: Predicts = "eps"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if self.predicts not in get_args(Predicts):
            raise UserError(f"a network cannot predict '{self.predicts}': {nearest(self.predicts, get_args(Predicts))}")
        if self.predicts == "previous" and not isinstance(self.schedule, Discrete):
            raise UserError("a network that predicts the previous image needs the discrete schedule it was trained on.")

    def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
        alpha, sigma = scales(self.schedule, t, x)
        seen = x
        if self.predicts == "edm":
            seen = x * (1 / _spread(alpha, sigma))  # c_in·x/a
        raw = self.network(seen, network_times(self.schedule, t, x), condition).to(x.dtype)
        fraction = None
        expected = x.shape[1] * (2 if self.learned_variance else 1)
        if raw.shape[1] != expected:
            raise UserError(
                f"the network gave {raw.shape[1]} channels for an image of {x.shape[1]}: {expected} are expected "
                f"{'with' if self.learned_variance else 'without'} a learned variance."
            )
        if self.learned_variance:
            raw, fraction = raw.chunk(2, dim=1)
        return self._predict(x, t, raw, alpha, sigma, fraction)

    def _predict(
        self, x: Tensor, t: Time, raw: Tensor, alpha: Scale, sigma: Scale, fraction: Tensor | None
    ) -> Prediction:
        if self.predicts == "eps":
            return Prediction.from_eps(x, raw, alpha, sigma, variance_fraction=fraction)
        if self.predicts in ("v", "flow"):
            # Both need no division by a or s alone, so they hold at either end of the schedule.
            x0, eps = self._of_velocity(x, raw, alpha, sigma)
            return Prediction(x, alpha, sigma, x0, eps, variance_fraction=fraction)
        if self.predicts == "edm":
            # c_skip·x/a + c_out·F, multiplied out by a so that it holds at zero SNR too.
            total = _spread(alpha, sigma)
            x0 = x * (alpha * SIGMA_DATA**2 / total**2) + raw * (sigma * SIGMA_DATA / total)
        elif self.predicts == "previous":
            # x_0 from the posterior mean of the training neighbours (t, t - 1): MATH §2 solved for x_0.
            a_s, s_s = scales(self.schedule, torch.as_tensor(t, dtype=torch.float64) - 1, x)
            step = alpha / a_s
            variance = sigma**2 - step**2 * s_s**2
            x0 = (raw * sigma**2 - x * (step * s_s**2)) / (a_s * variance)
        else:
            x0 = raw
        return Prediction.from_x0(x, x0, alpha, sigma, variance_fraction=fraction)

    def _of_velocity(self, x: Tensor, raw: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
        if self.predicts == "v":
            norm = alpha**2 + sigma**2
            return (alpha * x - sigma * raw) / norm, (sigma * x + alpha * raw) / norm
        norm = alpha + sigma
        return (x - sigma * raw) / norm, (x + alpha * raw) / norm


@dataclass(frozen=True)
class NoisyClassifier:
    """A classifier that was trained on noisy images: `(x, t) -> logits` [B, K], t in schedule time.

    It always tells its network the original time, whatever grid is walked (MATH §6).

    Attributes:
        network: `network(x, network_time, condition) -> logits` [B, K].
        schedule: the schedule that the classifier was trained for.
    """

    network: Network
    schedule: Schedule

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return self.network(x, network_times(self.schedule, t, x), Condition())
