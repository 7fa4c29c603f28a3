"""The diffusion objectives: L_simple, L_vlb and L_hybrid, for any prediction kind (docs/math.md §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from carrara import conditioning
from carrara.condition import Condition
from carrara.conditioning import Conditioner
from carrara.devices import to_device
from carrara.errors import UserError, nearest
from carrara.objectives.base import Examples, Terms
from carrara.objectives.times import TimeSampler, UniformTimes
from carrara.objectives.weights import Weight
from carrara.process import grids
from carrara.process.bound import Chain
from carrara.process.denoiser import NetworkDenoiser
from carrara.process.noise import Noise
from carrara.process.parameterisation import SIGMA_DATA, Predicts, target, to_prediction
from carrara.process.schedules import Schedule
from carrara.process.transitions import diffuse

Loss = Literal["simple", "hybrid", "vlb"]

NOISE, TIME = 0, 1
"""The sub-draws of one training step; the conditioners' follow, see `carrara.conditioning`."""


class DiffusionObjective:
    """The mean over dimensions of the squared error of what the network predicts, or the variational bound.

    Args:
        network: `network(x, network_time, condition) -> raw`, [B, C, H, W], 2C channels with a learned variance.
        schedule: the noise levels.
        predicts: what the network predicts.
        times: how times are drawn; uniformly by default.
        conditioners: each is dropped for some samples, by its own probability (Ho & Salimans 2022 use 0.1).
        loss: "simple", weight·(target - prediction)² (Ho et al. 2020, eq. 14); "vlb", T·L_t in bits per dimension,
            whose expectation over uniform t is the bound without its prior; "hybrid", the first plus `vlb_weight` times
            the second with the mean detached, so that the bound teaches the variance alone (Nichol & Dhariwal
            2021, eq. 16).
        weight: how much each level counts in the squared error.
        learned_variance: the network predicts its reverse variance too: needs "hybrid" or "vlb".
        chain: the chain whose bound is meant, T pairs; by default the whole table with 256 levels a pixel.
        vlb_weight: λ of the hybrid.
        sigma_data: EDM's σ_data, where the network predicts F.

    Raises:
        UserError: settings that cannot train a model.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        predicts: Predicts = "eps",
        times: TimeSampler | None = None,
        conditioners: Sequence[Conditioner] = (),
        *,
        loss: Loss = "simple",
        weight: Weight | None = None,
        learned_variance: bool = False,
        chain: Chain | None = None,
        vlb_weight: float = 1e-3,
        sigma_data: float = SIGMA_DATA,
    ) -> None:
        key = "objective.loss"
        if loss not in get_args(Loss):
            raise UserError(f"there is no loss '{loss}': {nearest(loss, get_args(Loss))}", key=key, code="unknown")
        if learned_variance and loss == "simple":
            raise UserError(
                "loss 'simple' never trains a learned variance: use 'hybrid' or 'vlb'.", key=key, code="conflict"
            )
        if loss == "hybrid" and not learned_variance:
            raise UserError(
                "loss 'hybrid' trains a learned variance, which this network does not have: use 'simple'.",
                key=key,
                code="conflict",
            )
        if loss != "simple" and chain is None:
            if not schedule.discrete:
                raise UserError(
                    "the bound of a continuous schedule needs a chain: give its grid.", key="chain", code="missing"
                )
            chain = Chain(schedule, grids.trailing(schedule, int(schedule.final_time)))
        self.network, self.schedule, self.predicts = network, schedule, predicts
        self.times = times or UniformTimes(chain.grid if chain else None)
        self.conditioners = tuple(conditioners)
        self.loss, self.weight, self.chain, self.vlb_weight = loss, weight or Weight(), chain, vlb_weight
        self.learned_variance, self.sigma_data = learned_variance, sigma_data
        _check_zero_snr(schedule, predicts, self.weight if loss != "vlb" else Weight())

    @property
    def players(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        self.players[player]
        x0, size = batch.x0, batch.x0.shape[0]
        times, importance = self.times.draw(self.schedule, draw.uniform((size,), sub=TIME))
        condition = conditioning.drop(self.conditioners, batch.condition, draw, size)
        loss, scalars = self.losses(x0, times, draw.like(x0, sub=NOISE), condition)
        if loss.requires_grad:
            self.times.observe(times, loss.detach(), range(size) if draw.ids is None else draw.ids)
        return Terms(
            loss * to_device(importance, loss.device, loss.dtype), scalars, quarters(self.schedule, times), times
        )

    def losses(self, x0: Tensor, times: Tensor, eps: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of every sample at given times, without importance weights.

        Args:
            x0, eps: clean images and noise, [B, …].
            times: schedule time of every sample, [B]; for a bound, times of its grid.
            condition: of every sample, after any dropout.

        Returns:
            The loss [B], differentiable; scalars [B] each, detached: `mse`, the plain squared error, and `vb`, the
            bound's term L_t in bits per dimension, where it is trained.
        """
        x = diffuse(self.schedule, x0, times, eps)
        denoiser = NetworkDenoiser(self.network, self.schedule, self.predicts, self.learned_variance, self.sigma_data)
        raw, fraction = denoiser.raw(x, times, condition)
        error = (
            (raw - target(self.predicts, self.schedule, x0, eps, times, self.sigma_data)).square().flatten(1).mean(1)
        )
        scalars = {"mse": error.detach()}
        if self.loss == "simple" or self.chain is None:
            return self._weigh(error, times), scalars
        mean = raw.detach() if self.loss == "hybrid" else raw
        prediction = to_prediction(self.predicts, self.schedule, x, times, mean, fraction, self.sigma_data)
        bound = self.chain.term(prediction, x0, self.chain.index(times)) / math.log(2)
        scalars["vb"] = bound.detach()
        scaled = len(self.chain) * bound
        if self.loss == "vlb":
            return scaled, scalars
        return self._weigh(error, times) + self.vlb_weight * scaled, scalars

    def _weigh(self, error: Tensor, times: Tensor) -> Tensor:
        weight = self.weight(self.predicts, self.schedule, times, self.sigma_data)
        return error * to_device(weight, error.device, error.dtype)

    def end_step(self) -> None:
        self.times.end_step()

    def state_dict(self) -> dict[str, Any]:
        return self.times.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times.load_state_dict(state)


def quarters(schedule: Schedule, times: Tensor) -> Tensor:
    """Which quarter of the network's times each time falls into, 0 the cleanest; int64 [B].

    Counted in the network's own time, so that EDM's levels, of which most lie below 1 of 80, fall into all of them.
    """
    first, final = schedule.network_time(schedule.first_time), schedule.network_time(schedule.final_time)
    fraction = (schedule.network_time(times) - first) / (final - first)
    return (fraction * 4).long().clamp(0, 3)


def _check_zero_snr(schedule: Schedule, predicts: Predicts, weight: Weight) -> None:
    """Raises UserError unless the level without signal, from which sampling starts, can be predicted and is trained."""
    last = torch.tensor([schedule.final_time], dtype=torch.float64)
    if float(schedule.alpha(last)) > 0:
        return
    if predicts == "eps":
        raise UserError(
            "this schedule ends at zero SNR, where ε does not determine the image: predict 'v', 'x0' or 'flow'.",
            key="objective.predicts",
            code="conflict",
        )
    if schedule.discrete and float(weight(predicts, schedule, last)) < 1e-12:
        raise UserError(
            f"the weight '{weight.kind}' is 0 at this schedule's zero-SNR end, from which sampling starts: "
            "give it a floor (0.1, for example).",
            key="objective.weight",
            code="conflict",
        )
