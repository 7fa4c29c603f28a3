"""Noise schedules: the signal scale a(t) and the noise scale s(t) of x_t = a(t) x_0 + s(t) ε, ε ~ N(0, I).

Time counts as the papers count: t = 0 is the clean image, `final_time` the noisiest level. Discrete schedules
hold a table for t = 1..T and interpolate linearly in log-SNR between its entries; continuous ones are formulas.
All arithmetic is float64. Throughout, log-SNR means λ = ln(a²/s²); the DPM-Solver papers write λ for half of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from carrara.entries import construct
from carrara.errors import UserError, nearest, whole_number

Time = float | Tensor
"""A time in schedule units: a float, or a tensor of any shape (float64, or any real type)."""


class Schedule(ABC):
    """The noise level as a function of time.

    Every method takes times of any shape and returns float64 tensors of that shape, on the times' device.

    Attributes:
        final_time: the noisiest time, T or 1 or the largest σ.
        first_time: the least noisy time at which a network is evaluated: 1 for a table, a small positive
            number for a continuous schedule. Grids that space the levels themselves end here before the clean
            point.
        discrete: whether whole numbers are the times that a network was trained at.
        spec: the constructor's name and arguments, plain data from which `build` makes the schedule again.
    """

    final_time: float
    first_time: float
    discrete: bool = False
    spec: dict[str, object]

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """The signal scale a(t): √ᾱ_t for a variance-preserving schedule, 1 at t = 0."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """The noise scale s(t): √(1 - ᾱ_t) for a variance-preserving schedule, 0 at t = 0."""

    @abstractmethod
    def time_at(self, log_snr: Time) -> Tensor:
        """The time at which the log-SNR is `log_snr`: the inverse of `log_snr`, clamped to the schedule.

        +inf is the clean point. A table whose last level holds no signal has no times between its last two
        levels: every finite log-SNR below the last but one is that level.
        """

    @abstractmethod
    def network_time(self, t: Time) -> Tensor:
        """The network's own time at t."""

    def log_snr(self, t: Time) -> Tensor:
        """ln(a²/s²): +inf at the clean point, -inf where no signal is left."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def check(self, t: Time) -> Tensor:
        """`t` as float64.

        Raises:
            UserError: a time lies outside [0, final_time] or is NaN (checked for times on the CPU only, so
                that a training step never waits for the device).
        """
        times = torch.as_tensor(t, dtype=torch.float64)
        if times.device.type == "cpu" and times.numel():
            low, high = float(times.min()), float(times.max())
            if not (low >= 0 and high <= self.final_time):
                wrong = low if not low >= 0 else high
                raise UserError(
                    f"time {wrong:g} lies outside the schedule's 0..{self.final_time:g}.", key="time", code="mismatch"
                )
        return times

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.spec.items() if k != "kind")
        return f"{self.spec['kind']}({arguments})"


@lru_cache(maxsize=8192)
def level(schedule: Schedule, t: float) -> tuple[float, float]:
    """(a(t), s(t)) as Python floats, cached: what a solver needs of a schedule at every step."""
    return float(schedule.alpha(t)), float(schedule.sigma(t))


class Discrete(Schedule):
    """A variance-preserving table of ᾱ_t for t = 1..T, interpolated linearly in log-SNR between its entries.

    The network's time is (t - 1)·`network_scale`: what ADM and Stable Diffusion were trained with (scale 1;
    1000/T for guided-diffusion's `rescale_timesteps`).
    """

    discrete = True
    first_time = 1.0

    def __init__(
        self,
        alphas_cumprod: Tensor | Sequence[float],
        spec: dict[str, object] | None = None,
        network_scale: float = 1.0,
    ) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        if table.ndim != 1 or len(table) < 2:
            raise UserError("a discrete schedule needs at least two steps.", key="schedule.alphas_cumprod")
        descends = bool((table.diff() < 0).all())
        if not descends or not 0 <= float(table[-1]) < float(table[0]) < 1:
            raise UserError(
                "alphas_cumprod must fall strictly and lie in [0, 1), noisiest last.", key="schedule.alphas_cumprod"
            )
        self.alphas_cumprod = table
        self.final_time = float(len(table))
        self.network_scale = network_scale
        self.spec = spec or {"kind": "from_alphas_cumprod", "alphas_cumprod": table.tolist()}
        if network_scale != 1.0:
            self.spec = {**self.spec, "network_scale": network_scale}
        # Entry 0 is the clean point, so that whole times index the tables directly.
        self._alpha = torch.cat([torch.ones(1, dtype=torch.float64), table.sqrt()])
        self._sigma = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - table).sqrt()])
        self._log_snr = 2 * (self._alpha.log() - self._sigma.log())

    @property
    def betas(self) -> Tensor:
        """β_t = 1 - ᾱ_t/ᾱ_{t-1}, float64 [T]."""
        return 1 - self.alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    def _read(self, table: Tensor, t: Time, holds: Literal["signal", "noise", "log_snr"]) -> Tensor:
        times = self.check(t)
        table, log_snr = table.to(times.device), self._log_snr.to(times.device)
        below = times.floor().long().clamp(0, len(table) - 1)
        exact = table[below]
        fraction = times - below
        if times.device.type == "cpu" and not bool(fraction.any()):
            return exact
        if times.device.type == "cpu":
            self._check_between(times[fraction > 0])
        above = (below + 1).clamp(max=len(table) - 1)
        between = torch.lerp(log_snr[below], log_snr[above], fraction)
        value = between if holds == "log_snr" else torch.sigmoid(between if holds == "signal" else -between).sqrt()
        return torch.where(fraction == 0, exact, value)

    def _check_between(self, times: Tensor) -> None:
        if float(times.min()) < 1:
            raise UserError(
                f"a discrete schedule has no level at t = {float(times.min()):g}, between the clean point and 1.",
                key="time",
            )
        if float(self.alphas_cumprod[-1]) == 0 and float(times.max()) > self.final_time - 1:
            raise UserError(
                f"t = {float(times.max()):g} lies next to the zero-SNR end of the schedule, where there is no log-SNR "
                "to interpolate to: use whole times.",
                key="time",
            )

    def alpha(self, t: Time) -> Tensor:
        return self._read(self._alpha, t, "signal")

    def sigma(self, t: Time) -> Tensor:
        return self._read(self._sigma, t, "noise")

    def log_snr(self, t: Time) -> Tensor:
        return self._read(self._log_snr, t, "log_snr")

    def time_at(self, log_snr: Time) -> Tensor:
        value = torch.as_tensor(log_snr, dtype=torch.float64)
        ascending = self._log_snr[1:].to(value.device).neg()  # -λ at t = 1..T
        above = torch.searchsorted(ascending, -value).clamp(1, len(ascending) - 1)
        low, high = ascending[above - 1], ascending[above]
        fraction = ((-value - low) / (high - low)).nan_to_num(1.0).clamp(0, 1)
        return torch.where(torch.isposinf(value), 0.0, above + fraction)

    def network_time(self, t: Time) -> Tensor:
        return (torch.as_tensor(t, dtype=torch.float64) - 1) * self.network_scale


def from_alphas_cumprod(alphas_cumprod: Tensor | Sequence[float], network_scale: float = 1.0) -> Discrete:
    """A discrete schedule from its table ᾱ_1..ᾱ_T, strictly falling, ᾱ_T = 0 allowed."""
    return Discrete(alphas_cumprod, network_scale=network_scale)


def from_betas(betas: Tensor | Sequence[float], network_scale: float = 1.0) -> Discrete:
    """A discrete schedule from β_1..β_T, each in (0, 1]: ᾱ_t = Π (1 - β_i)."""
    values = torch.as_tensor(betas, dtype=torch.float64)
    if values.numel() < 2 or not bool(((values > 0) & (values <= 1)).all()):
        raise UserError("betas must be at least two numbers, each above 0 and at most 1.", key="schedule.betas")
    spec: dict[str, object] = {"kind": "from_betas", "betas": values.tolist()}
    return Discrete(torch.cumprod(1 - values, 0), spec, network_scale)


def _count(steps: int) -> int:
    return whole_number(steps, "schedule.steps", least=2)


def linear(steps: int = 1000, network_scale: float = 1.0) -> Discrete:
    """β from 1e-4 to 0.02, both scaled by 1000/T (Ho et al. 2020, §4; the scaling as guided-diffusion does it).

    Raises:
        UserError: fewer than 21 steps, where the last β would reach 1.
    """
    if _count(steps) < 21:
        raise UserError(
            f"the linear schedule needs at least 21 steps (its last β is 20/T), not {steps}.", key="schedule.steps"
        )
    betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    return Discrete(torch.cumprod(1 - betas, 0), {"kind": "linear", "steps": steps}, network_scale)


def scaled_linear(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, network_scale: float = 1.0
) -> Discrete:
    """β linear in its square root: the schedule of latent diffusion and Stable Diffusion, whose configuration
    files call it "linear" (Rombach et al. 2022)."""
    if not 0 < beta_start < beta_end < 1:
        raise UserError("scaled_linear needs 0 < beta_start < beta_end < 1.", key="schedule.beta_end")
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, _count(steps), dtype=torch.float64) ** 2
    spec: dict[str, object] = {
        "kind": "scaled_linear",
        "steps": steps,
        "beta_start": beta_start,
        "beta_end": beta_end,
    }
    return Discrete(torch.cumprod(1 - betas, 0), spec, network_scale)


def cosine(steps: int = 1000, network_scale: float = 1.0) -> Discrete:
    """ᾱ(t) = f(t)/f(0), f(t) = cos²((t/T + 0.008)/1.008 · π/2), each β capped at 0.999
    (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(_count(steps) + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return Discrete(torch.cumprod(1 - betas, 0), {"kind": "cosine", "steps": steps}, network_scale)


def sigmoid(
    steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, network_scale: float = 1.0
) -> Discrete:
    """ᾱ falls along a sigmoid from `start` to `end` at temperature `tau` (Jabri et al. 2022, algorithm 1),
    each β capped at 0.999 as for `cosine`."""
    if not (end > start and tau > 0):
        raise UserError("the sigmoid schedule needs start < end and tau > 0.", key="schedule.tau")
    t = torch.arange(_count(steps) + 1, dtype=torch.float64) / steps
    value = torch.sigmoid((t * (end - start) + start) / tau)
    alphas_cumprod = (value[-1] - value) / (value[-1] - value[0])
    betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    spec: dict[str, object] = {"kind": "sigmoid", "steps": steps, "start": start, "end": end, "tau": tau}
    return Discrete(torch.cumprod(1 - betas, 0), spec, network_scale)


def zero_terminal_snr(schedule: Discrete) -> Discrete:
    """The schedule shifted and scaled so that nothing of the image is left at T (Lin et al. 2023, algorithm 1):
    √ᾱ' = (√ᾱ - √ᾱ_T)·√ᾱ_1/(√ᾱ_1 - √ᾱ_T). The network's times stay."""
    if not isinstance(schedule, Discrete):
        raise UserError(
            "only a discrete schedule can be rescaled to zero terminal SNR.", key="schedule", code="unsupported"
        )
    root = schedule.alphas_cumprod.sqrt()
    rescaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    spec: dict[str, object] = {"kind": "zero_terminal_snr", "schedule": schedule.spec}
    rescheduled = Discrete(rescaled**2, spec)
    rescheduled.network_scale = schedule.network_scale
    return rescheduled


class VarianceExploding(Schedule):
    """a = 1 and s = t = σ (Song et al. 2021; Karras et al. 2022). The network's time is ln(σ)/4."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise UserError("the EDM schedule needs 0 < sigma_min < sigma_max.", key="schedule.sigma_max")
        self.first_time, self.final_time = sigma_min, sigma_max
        self.spec = {"kind": "edm", "sigma_min": sigma_min, "sigma_max": sigma_max}

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(self.check(t))

    def sigma(self, t: Time) -> Tensor:
        return self.check(t)

    def time_at(self, log_snr: Time) -> Tensor:
        return torch.exp(-torch.as_tensor(log_snr, dtype=torch.float64) / 2).clamp(max=self.final_time)

    def network_time(self, t: Time) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64).log() / 4


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> VarianceExploding:
    """The schedule of EDM (Karras et al. 2022, table 1): time is σ itself, `final_time` is `sigma_max`."""
    return VarianceExploding(sigma_min, sigma_max)


class RectifiedFlow(Schedule):
    """a = 1 - τ, s = τ with τ = k·t/(1 + (k - 1)·t), t in [0, 1] (Liu et al. 2022; the shift of Esser et al.
    2024, §5.3.2). The network's time is 1000·τ, as Stable Diffusion 3's."""

    final_time = 1.0

    def __init__(self, shift: float, first_time: float) -> None:
        if not (shift > 0 and 0 < first_time < 1):
            raise UserError(
                "the flow schedule needs a positive shift and a first_time between 0 and 1.", key="schedule.shift"
            )
        self.shift, self.first_time = shift, first_time
        self.spec = {"kind": "rectified_flow", "shift": shift, "first_time": first_time}

    def alpha(self, t: Time) -> Tensor:
        # 1 - τ, written so that it keeps its digits where it vanishes.
        times = self.check(t)
        return (1 - times) / (1 + (self.shift - 1) * times)

    def sigma(self, t: Time) -> Tensor:
        times = self.check(t)
        return self.shift * times / (1 + (self.shift - 1) * times)

    def time_at(self, log_snr: Time) -> Tensor:
        flow = torch.sigmoid(-torch.as_tensor(log_snr, dtype=torch.float64) / 2)
        return flow / (self.shift - (self.shift - 1) * flow)

    def network_time(self, t: Time) -> Tensor:
        return 1000 * self.sigma(t)


def rectified_flow(shift: float = 1.0, first_time: float = 1e-3) -> RectifiedFlow:
    """The straight path from noise to image, with time shift k = `shift` (1 is none)."""
    return RectifiedFlow(shift, first_time)


class ContinuousVP(Schedule):
    """ln a(t) = -t²(β_max - β_min)/4 - t·β_min/2, s² = 1 - a², t in [0, 1] (Song et al. 2021, eq. 33).
    The network's time is 999·t, as of score_sde's continuous models."""

    final_time = 1.0

    def __init__(self, beta_min: float, beta_max: float, first_time: float) -> None:
        if not (0 < beta_min < beta_max and 0 < first_time < 1):
            raise UserError(
                "the VP-SDE schedule needs 0 < beta_min < beta_max and a first_time between 0 and 1.",
                key="schedule.beta_max",
            )
        self.beta_min, self.beta_max, self.first_time = beta_min, beta_max, first_time
        self.spec = {"kind": "vp_sde", "beta_min": beta_min, "beta_max": beta_max, "first_time": first_time}

    def _log_alpha(self, t: Time) -> Tensor:
        times = self.check(t)
        return -(times**2) * (self.beta_max - self.beta_min) / 4 - times * self.beta_min / 2

    def alpha(self, t: Time) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def time_at(self, log_snr: Time) -> Tensor:
        # -2 ln a = softplus(-λ) = β_min t + (β_max - β_min) t²/2, solved without cancellation.
        value = torch.nn.functional.softplus(-torch.as_tensor(log_snr, dtype=torch.float64), threshold=700)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * value).sqrt()
        return (2 * value / (root + self.beta_min)).clamp(max=self.final_time)

    def network_time(self, t: Time) -> Tensor:
        return 999 * torch.as_tensor(t, dtype=torch.float64)


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0, first_time: float = 1e-3) -> ContinuousVP:
    """The continuous variance-preserving schedule of the score SDE."""
    return ContinuousVP(beta_min, beta_max, first_time)


class Trigonometric(Schedule):
    """a = cos(πt/2), s = sin(πt/2), t in [0, 1]: the uncapped cosine schedule in continuous time (Salimans & Ho
    2022, §2). The network's time is t itself, as of the v-diffusion models."""

    final_time = 1.0

    def __init__(self, first_time: float) -> None:
        if not 0 < first_time < 1:
            raise UserError("the trigonometric schedule needs a first_time between 0 and 1.", key="schedule.first_time")
        self.first_time = first_time
        self.spec = {"kind": "trigonometric", "first_time": first_time}

    def alpha(self, t: Time) -> Tensor:
        # The sine of the complement is exactly 0 at t = 1, where the cosine is not.
        return ((1 - self.check(t)) * (math.pi / 2)).sin()

    def sigma(self, t: Time) -> Tensor:
        return (self.check(t) * (math.pi / 2)).sin()

    def time_at(self, log_snr: Time) -> Tensor:
        return torch.exp(-torch.as_tensor(log_snr, dtype=torch.float64) / 2).atan() * (2 / math.pi)

    def network_time(self, t: Time) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64)


def trigonometric(first_time: float = 1e-3) -> Trigonometric:
    """The schedule on the quarter circle, from the clean image at t = 0 to pure noise at t = 1."""
    return Trigonometric(first_time)


def build(spec: dict[str, object]) -> Schedule:
    """A schedule from its `spec`: the constructor's name under `kind`, and its arguments.

    Raises:
        UserError: an unknown kind, or arguments that it does not take.
    """
    arguments: dict[str, Any] = dict(spec)
    kind = str(arguments.pop("kind", ""))
    constructors: dict[str, Callable[..., Schedule]] = {
        f.__name__: f
        for f in (
            linear,
            scaled_linear,
            cosine,
            sigmoid,
            from_betas,
            from_alphas_cumprod,
            edm,
            rectified_flow,
            vp_sde,
            trigonometric,
        )
    }
    if kind == "zero_terminal_snr":
        inner = arguments.pop("schedule", None)
        inner_schedule = build(inner) if isinstance(inner, dict) else None
        if not isinstance(inner_schedule, Discrete) or arguments:
            raise UserError(
                "zero_terminal_snr takes one argument, 'schedule', the discrete schedule to rescale.", key="schedule"
            )
        return zero_terminal_snr(inner_schedule)
    if kind not in constructors:
        raise UserError(
            f"there is no schedule '{kind}': {nearest(kind, [*constructors, 'zero_terminal_snr'])}",
            key="schedule.kind",
            code="unknown",
        )
    return construct(constructors[kind], arguments, "schedule")
