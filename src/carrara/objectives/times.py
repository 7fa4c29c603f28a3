"""Which noise levels a training step visits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from carrara.process.noise import Noise
from carrara.process.schedules import Schedule


class TimeSampler(Protocol):
    """Draws the time of every sample and the importance weight that keeps the expectation unbiased."""

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            schedule: the noise levels.
            uniform: float64 [B] in (0, 1), addressed by position.

        Returns:
            times, float64 [B], in schedule units; weights, float64 [B].
        """
        ...


@dataclass(frozen=True)
class UniformTimes:
    """t uniform over 1..T of a table (Ho et al. 2020, algorithm 1), over first_time..final_time otherwise."""

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        if schedule.discrete:
            times = (uniform * schedule.final_time).floor() + 1
        else:
            times = schedule.first_time + uniform * (schedule.final_time - schedule.first_time)
        return times, torch.ones_like(times)


def draw_uniform(noise: Noise, batch: int, sub: int) -> Tensor:
    """One uniform number per sample, float64 [B]."""
    return noise.uniform((batch, 1), sub=sub).squeeze(1)
