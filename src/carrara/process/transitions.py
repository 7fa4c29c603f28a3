"""Gaussian transitions between any two times of the process (MATH §1-2).

For s < t: q(x_t|x_s) = N(a_{t|s} x_s, σ²_{t|s} I) with a_{t|s} = a_t/a_s and σ²_{t|s} = s_t² - a_{t|s}² s_s². For
neighbours of a table these are √(1-β_t) and β_t. Everything a solver needs is in (a_t, s_t, a_s, s_s), so no
table of respaced β is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.prediction import Scale, scales
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

        The difference of squares is taken as a product, which loses half as many digits between close levels.
        """
        carried = self.step * self.s_s
        return max((self.s_t - carried) * (self.s_t + carried), 0.0)

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


def learned_log_variance(raw: Tensor, small: Scale, large: Scale) -> Tensor:
    """ln Σ = v ln σ²_{t|s} + (1 - v) ln σ²_post with v = (raw + 1)/2 (Nichol & Dhariwal 2021, eq. 15).

    Args:
        raw: the network's second half, [B, …], not clamped.
        small, large: the two ends for the pair that is walked, or for one pair a sample, [B, 1, …].
    """
    low, high = _log(small), _log(large)
    return raw * ((high - low) / 2) + (high + low) / 2


def diffuse(schedule: Schedule, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
    """x_t = a(t) x_0 + s(t) ε: a draw of q(x_t|x_0) (Ho et al. 2020, eq. 4).

    Args:
        x0, eps: [B, …].
        t: one time, or [B].
    """
    alpha, sigma = scales(schedule, t, x0)
    return alpha * x0 + sigma * eps


@dataclass(frozen=True)
class Gaussian:
    """N(mean, e^{log_variance}), every dimension on its own.

    Attributes:
        mean: [B, …].
        log_variance: ln Σ, a float for all dimensions or a tensor that broadcasts against the mean; -inf for a
            point.
    """

    mean: Tensor
    log_variance: Scale

    def rows(self, index: Tensor) -> Gaussian:
        """The Gaussians of some of the samples."""
        log_variance = self.log_variance
        return Gaussian(self.mean[index], log_variance[index] if isinstance(log_variance, Tensor) else log_variance)

    def draw(self, z: Tensor) -> Tensor:
        """mean + √Σ z for standard normal z, [B, …]."""
        return self.mean + _exp(0.5 * self.log_variance) * z

    def log_prob(self, x: Tensor) -> Tensor:
        """ln N(x; mean, Σ) of every dimension, in nats, [B, …]."""
        squares = (x - self.mean) ** 2 * _exp(-self.log_variance)
        return -0.5 * (squares + self.log_variance + math.log(2 * math.pi))

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self ‖ other) of every dimension, in nats, [B, …]:
        ½ (ln Σ₂/Σ₁ + Σ₁/Σ₂ + (m₁ - m₂)²/Σ₂ - 1)."""
        ratio = self.log_variance - other.log_variance
        growth = torch.expm1(ratio) if isinstance(ratio, Tensor) else math.expm1(ratio)
        return 0.5 * (growth - ratio + (self.mean - other.mean) ** 2 * _exp(-other.log_variance))

    def bin_log_prob(self, x: Tensor, levels: int = 256, cdf: Literal["erf", "tanh"] = "erf") -> Tensor:
        """ln of the probability of the bin around every x, in nats, [B, …] (Ho et al. 2020, eq. 13).

        Args:
            x: images of `levels` evenly spaced values in [-1, 1], both ends included. A bin reaches half a step
                to either side; the first and the last are open outwards.
            levels: 256 for 8-bit images, 17 for scikit-learn's digits.
            cdf: the Gaussian's distribution function: "erf", exact far into the tails, or guided-diffusion's
                "tanh" approximation with its floor of 1e-12 (up to 1e-4 bits/dim apart).
        """
        if levels < 2:
            raise UserError(f"an image has at least 2 levels, {levels} were asked for.")
        half = 1 / (levels - 1)
        narrow = _exp(-0.5 * self.log_variance)
        above, below = (x - self.mean + half) * narrow, (x - self.mean - half) * narrow
        first, last = x < -1 + half, x > 1 - half
        if cdf == "tanh":
            upper, lower = _tanh_cdf(above), _tanh_cdf(below)
            inside = torch.where(last, 1 - lower, upper - lower)
            return torch.where(first, upper, inside).clamp(min=1e-12).log()
        return _log_normal_between(below, above, first, last)


def _exp(value: Scale) -> Scale:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _log(value: Scale) -> Scale:
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value > 0 else -math.inf


def _tanh_cdf(x: Tensor) -> Tensor:
    """guided-diffusion's approximation of the standard normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _log_normal_between(low: Tensor, high: Tensor, open_low: Tensor, open_high: Tensor) -> Tensor:
    """ln(Φ(high) - Φ(low)), with low = -∞ or high = ∞ where open; computed in float64, finite for any bin."""
    # Both ends are mirrored to the side where Φ is small, so that the difference keeps its digits.
    mirror = torch.where(open_low, False, open_high | (low + high > 0))
    top = torch.where(mirror, -low, high).double()
    bottom = torch.where(mirror, -high, low).double()
    # An open end lies so far out that nothing beyond it counts, yet is finite, as its gradient must be.
    bottom = torch.where(open_low | open_high, top.detach().clamp(max=0) - 50, bottom)
    upper, lower = torch.special.log_ndtr(top), torch.special.log_ndtr(bottom)
    between: Tensor = upper + torch.log(-torch.expm1(lower - upper))
    return between.to(low.dtype)


def marginal(schedule: Schedule, x0: Tensor, t: Time) -> Gaussian:
    """q(x_t|x_0) = N(a_t x_0, s_t² I) (Ho et al. 2020, eq. 4); t is one time, or [B]."""
    alpha, sigma = scales(schedule, t, x0)
    return Gaussian(alpha * x0, 2 * _log(sigma))


def forward(schedule: Schedule, x: Tensor, s: float, t: float) -> Gaussian:
    """q(x_t|x_s) = N(a_{t|s} x_s, σ²_{t|s} I) for any s < t; x is x_s, [B, …]."""
    pair = Pair.of(schedule, t, s)
    return Gaussian(pair.step * x, _log(pair.variance))


def posterior(schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float) -> Gaussian:
    """q(x_s|x_t, x_0) for any s < t (Ho et al. 2020, eq. 6-7); x is x_t, [B, …]."""
    pair = Pair.of(schedule, t, s)
    return Gaussian(pair.posterior_mean(x, x0), _log(pair.posterior_variance))
