"""Gaussian transitions between any two times of the process (docs/math.md §1-2).

For s < t: q(x_t|x_s) = N(α_{t|s} x_s, σ²_{t|s} I) with α_{t|s} = α_t/α_s and σ²_{t|s} = σ_t² - α_{t|s}² σ_s². For
neighbours of a table these are √(1-β_t) and β_t. Everything a solver needs is in (α_t, σ_t, α_s, σ_s), so no
table of respaced β is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.prediction import Prediction, Scale, scales
from carrara.process.schedules import Schedule, Time, level

S = TypeVar("S", float, Tensor)
"""A coefficient: one number for the batch, or a tensor [B, 1, …] with one for each sample."""


@dataclass(frozen=True)
class Transition(Generic[S]):
    """The coefficients of the step from a time t to a cleaner time s.

    Floats for one pair of times; tensors [B, 1, …] for one pair of each sample. On a reversed grid s is the noisier
    one: see `reversed`.

    Attributes:
        schedule: the noise levels.
        t, s: the two times.
        alpha_t, sigma_t, alpha_s, sigma_s: signal and noise scales at both.
        previous: the grid's time before t, from which the reverse variance into the clean point follows; None at the
            grid's start.
    """

    schedule: Schedule
    t: float
    s: float
    alpha_t: S
    sigma_t: S
    alpha_s: S
    sigma_s: S
    previous: float | None = None

    @staticmethod
    def of(schedule: Schedule, t: float, s: float, previous: float | None = None) -> Transition[float]:
        """The transition of a schedule from t to s."""
        return Transition(schedule, t, s, *level(schedule, t), *level(schedule, s), previous)

    @staticmethod
    def per_sample(schedule: Schedule, t: Time, s: Time, x: Tensor) -> Transition[Tensor]:
        """One transition for each sample; `t` and `s` of it are NaN.

        Args:
            t, s: [B], or one time.
            x: [B, …], which the coefficients are to multiply; their type is x's.
        """
        ends = (*scales(schedule, t, x), *scales(schedule, s, x))
        alpha_t, sigma_t, alpha_s, sigma_s = (torch.as_tensor(scale, dtype=x.dtype, device=x.device) for scale in ends)
        return Transition(schedule, math.nan, math.nan, alpha_t, sigma_t, alpha_s, sigma_s)

    def reversed(self) -> Transition[S]:
        """The same pair of times, from s to t."""
        return Transition(self.schedule, self.s, self.t, self.alpha_s, self.sigma_s, self.alpha_t, self.sigma_t)

    @cached_property
    def alpha_ts(self) -> S:
        """α_{t|s} = α_t/α_s."""
        return self.alpha_t / self.alpha_s

    @cached_property
    def variance(self) -> S:
        """σ²_{t|s} = σ_t² - α_{t|s}² σ_s², the "large" reverse variance: β_t for neighbours.

        The difference of squares is taken as a product, which loses half as many digits between close levels.
        """
        carried = self.alpha_ts * self.sigma_s
        difference = (self.sigma_t - carried) * (self.sigma_t + carried)
        return difference.clamp(min=0) if isinstance(difference, Tensor) else max(difference, 0.0)

    @cached_property
    def posterior_variance(self) -> S:
        """σ²_post = σ²_{t|s} σ_s²/σ_t², the "small" reverse variance: β̃_t for neighbours, 0 at the clean point (Ho et
        al. 2020, eq. 7)."""
        return self.variance * (self.sigma_s / self.sigma_t) ** 2

    @cached_property
    def x_coefficient(self) -> S:
        """The coefficient of x_t in the posterior mean: α_{t|s} σ_s²/σ_t²."""
        return self.alpha_ts * (self.sigma_s / self.sigma_t) ** 2

    @cached_property
    def x0_coefficient(self) -> S:
        """The coefficient of x_0 in the posterior mean: α_s σ²_{t|s}/σ_t²."""
        return self.alpha_s * self.variance / self.sigma_t**2

    def posterior_mean(self, x: Tensor, x0: Tensor) -> Tensor:
        """The mean of q(x_s|x_t, x_0), [B, …] (Ho et al. 2020, eq. 7)."""
        if isinstance(self.x0_coefficient, Tensor):
            return x * self.x_coefficient + x0 * self.x0_coefficient
        return torch.add(x * self.x_coefficient, x0, alpha=self.x0_coefficient)

    def floor_variance(self: Transition[float]) -> float:
        """The smaller end of the reverse variance, never 0.

        On the pair that ends clean σ²_post is 0; guided-diffusion then takes σ²_post of the preceding, noisier pair of
        the grid (previous, t), and σ²_{t|s} on a grid of one pair (docs/math.md §2).
        """
        if self.posterior_variance > 0:
            return self.posterior_variance
        if self.previous is None:
            return self.variance
        return Transition.of(self.schedule, self.previous, self.t).posterior_variance


ReverseVariance = Literal["small", "large", "learned", "optimal"]
"""Σ of p_θ(x_s|x_t): σ²_post, σ²_{t|s}, between the two as the network predicts, or, for denoisers that know
Var[x_0|x_t], σ²_post + (α_s σ²_{t|s}/σ_t²)² Var[x_0|x_t] (Bao et al. 2022)."""


def chosen_variance(kind: ReverseVariance | None, prediction: Prediction) -> ReverseVariance:
    """`kind`, or by default "learned" where the model predicts it, else "small".

    Raises:
        UserError: a variance that the denoiser does not predict.
    """
    kind = kind or ("small" if prediction.variance_fraction is None else "learned")
    if kind == "optimal" and prediction.x0_variance is None:
        raise UserError(
            "variance='optimal' needs a denoiser that knows Var[x0|x_t], as the oracle does.",
            key="variance",
            code="unsupported",
        )
    if kind == "learned" and prediction.variance_fraction is None:
        raise UserError(
            "variance='learned' needs a model that was trained with a learned variance.",
            key="variance",
            code="unsupported",
        )
    return kind


def learned_log_variance(raw: Tensor, small: Scale, large: Scale) -> Tensor:
    """ln Σ = v ln σ²_{t|s} + (1 - v) ln σ²_post with v = (raw + 1)/2 (Nichol & Dhariwal 2021, eq. 15).

    Args:
        raw: the network's second half, [B, …], not clamped.
        small, large: the two ends for one transition, or for one of each sample, [B, 1, …].
    """
    low, high = _log(small), _log(large)
    return raw * ((high - low) / 2) + (high + low) / 2


def diffuse(schedule: Schedule, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
    """x_t = α(t) x_0 + σ(t) ε: a draw of q(x_t|x_0) (Ho et al. 2020, eq. 4).

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
            raise UserError(f"an image has at least 2 levels, not {levels}.", key="levels")
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
    """q(x_t|x_0) = N(α_t x_0, σ_t² I) (Ho et al. 2020, eq. 4); t is one time, or [B]."""
    alpha, sigma = scales(schedule, t, x0)
    return Gaussian(alpha * x0, 2 * _log(sigma))


def forward(schedule: Schedule, x: Tensor, s: float, t: float) -> Gaussian:
    """q(x_t|x_s) = N(α_{t|s} x_s, σ²_{t|s} I) for any s < t; x is x_s, [B, …]."""
    transition = Transition.of(schedule, t, s)
    return Gaussian(transition.alpha_ts * x, _log(transition.variance))


def posterior(schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float) -> Gaussian:
    """q(x_s|x_t, x_0) for any s < t (Ho et al. 2020, eq. 6-7); x is x_t, [B, …]."""
    transition = Transition.of(schedule, t, s)
    return Gaussian(transition.posterior_mean(x, x0), _log(transition.posterior_variance))
