"""Gaussian transitions between any two times of the process (MATH §1-2).

For s < t: q(x_t|x_s) = N(a_{t|s} x_s, σ²_{t|s} I) with a_{t|s} = a_t/a_s and σ²_{t|s} = s_t² - a_{t|s}² s_s². For
neighbours of a table these are √(1-β_t) and β_t. Everything a solver needs is in (a_t, s_t, a_s, s_s), so no
table of respaced β is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from carrara.process.schedules import Schedule, Time, level


@dataclass(frozen=True)
class Pair:
    """The coefficients of one walked pair: from the noisier time t to the cleaner time s < t.

    Attributes:
        a_t, s_t, a_s, s_s: signal and noise scales at both ends, as floats.
    """

    a_t: float
    s_t: float
    a_s: float
    s_s: float

    @classmethod
    def of(cls, schedule: Schedule, t: float, s: float) -> Pair:
        """The pair (t, s) of a schedule."""
        return cls(*level(schedule, t), *level(schedule, s))

    @cached_property
    def step(self) -> float:
        """a_{t|s} = a_t/a_s."""
        return self.a_t / self.a_s

    @cached_property
    def variance(self) -> float:
        """σ²_{t|s}, the "large" reverse variance: β_t for neighbours.

        Written as s_t² (1 - SNR_t/SNR_s) so that close levels lose no digits that the tables hold.
        """
        return max(self.s_t**2 - (self.step * self.s_s) ** 2, 0.0)

    @cached_property
    def posterior_variance(self) -> float:
        """σ²_post = σ²_{t|s} s_s²/s_t², the "small" reverse variance: β̃_t for neighbours, 0 at the clean point."""
        return self.variance * (self.s_s / self.s_t) ** 2

    @cached_property
    def x_coefficient(self) -> float:
        """The coefficient of x_t in the posterior mean: a_{t|s} s_s²/s_t²."""
        return self.step * (self.s_s / self.s_t) ** 2

    @cached_property
    def x0_coefficient(self) -> float:
        """The coefficient of x_0 in the posterior mean: a_s σ²_{t|s}/s_t²."""
        return self.a_s * self.variance / self.s_t**2

    def posterior_mean(self, x: Tensor, x0: Tensor) -> Tensor:
        """The mean of q(x_s|x_t, x_0), [B, …]."""
        return torch.add(x * self.x_coefficient, x0, alpha=self.x0_coefficient)


def floor_variance(schedule: Schedule, t: float, s: float, previous: float | None) -> float:
    """The smaller end of the reverse variance for the pair (t, s), never 0.

    On the pair that ends clean σ²_post is 0; guided-diffusion then takes σ²_post of the preceding, noisier
    walked pair (previous, t), and σ²_{t|s} on a grid of one pair (MATH §2).
    """
    pair = Pair.of(schedule, t, s)
    if pair.posterior_variance > 0:
        return pair.posterior_variance
    return pair.variance if previous is None else Pair.of(schedule, previous, t).posterior_variance


def learned_log_variance(raw: Tensor, small: float, large: float) -> Tensor:
    """ln Σ = v ln σ²_{t|s} + (1 - v) ln σ²_post with v = (raw + 1)/2 (Nichol & Dhariwal 2021, eq. 15).

    Args:
        raw: the network's second half, [B, …], not clamped.
        small, large: the two ends for the pair that is walked.
    """
    fraction = (raw + 1) / 2
    return torch.add(fraction * math.log(large), 1 - fraction, alpha=math.log(small))


def diffuse(schedule: Schedule, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
    """x_t = a(t) x_0 + s(t) ε: a draw of q(x_t|x_0) (Ho et al. 2020, eq. 4).

    Args:
        x0, eps: [B, …].
        t: one time, or [B].
    """
    from carrara.process.prediction import scales

    alpha, sigma = scales(schedule, t, x0)
    return alpha * x0 + sigma * eps
