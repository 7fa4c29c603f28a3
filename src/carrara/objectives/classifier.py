"""Training a classifier of noisy images, for classifier guidance (Dhariwal & Nichol 2021, §4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carrara.devices import to_device
from carrara.errors import UserError
from carrara.networks.slots import check_labels
from carrara.objectives.base import Examples, Terms
from carrara.objectives.diffusion import NOISE, TIME, quarters
from carrara.objectives.times import TimeSampler, UniformTimes
from carrara.process.denoiser import NoisyClassifier
from carrara.process.noise import Noise
from carrara.process.schedules import Schedule
from carrara.process.transitions import diffuse


class ClassifierObjective:
    """Cross-entropy of p(y|x_t) at random t, x_t noised by the diffusion model's own schedule.

    Args:
        network: `network(x, network_time, condition) -> logits` [B, K].
        schedule: the schedule of the diffusion model that the classifier is to guide.
        times: which levels are visited.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, times: TimeSampler | None = None) -> None:
        self.network, self.schedule = network, schedule
        self.times = times or UniformTimes()

    @property
    def players(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        """Cross-entropy in nats; `top1` and `top5` are 1 where the label is among the likeliest one or five.

        Raises:
            UserError: samples without labels, or a label that is none of the network's classes.
        """
        self.players[player]
        x0, label = batch.x0, batch.condition.label
        if label is None:
            raise UserError("a classifier learns from labels: this data has none.", key="label", code="missing")
        times, importance = self.times.draw(self.schedule, draw.uniform((len(x0),), sub=TIME))
        x = diffuse(self.schedule, x0, times, draw.like(x0, sub=NOISE))
        logits = NoisyClassifier(self.network, self.schedule)(x, times).float()
        label = to_device(label, logits.device)
        check_labels(label, logits.shape[1])
        loss = nn.functional.cross_entropy(logits, label, reduction="none")
        if loss.requires_grad:
            self.times.observe(times, loss.detach(), range(len(x0)) if draw.ids is None else draw.ids)
        return Terms(
            loss * to_device(importance, loss.device, loss.dtype),
            _accuracy(logits.detach(), label),
            quarters(self.schedule, times),
            times,
        )

    def end_step(self) -> None:
        self.times.end_step()

    def state_dict(self) -> dict[str, Any]:
        return self.times.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times.load_state_dict(state)


def _accuracy(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Whether the label is among the one and the five likeliest classes, float32 [B] each."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == label.unsqueeze(1)
    return {"top1": ranked[:, 0].float(), "top5": ranked.any(1).to(torch.float32)}
