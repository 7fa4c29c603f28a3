"""Likelihood by the probability-flow ODE (Song et al. 2021, §4.3; the trace estimate of Grathwohl et al. 2019).

With σ = s/a, the flow of x/a is d(x/a) = ε̂ dσ for every schedule. Integrated here is z = x/√(a² + s²), which stays of
order one: with u = ln σ and r = s/√(a² + s²),

    dz/du = r (ε̂ - r z),    d ln p(z)/du = -∇·(dz/du) = -(r ∇_z·ε̂ - r² D),

from the clean image up in equal steps of u by the classical fourth-order Runge-Kutta method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.evaluation.bound import LN2, Conditioned, check_levels, evaluating, unpack
from carrara.model import DiffusionModel
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser
from carrara.process.schedules import Schedule, level

Trace = Literal["exact", "hutchinson"]

LEAST_LOG_SNR = -20.0
"""Where a schedule that ends without any signal is taken to end: a = 5e-5, all noise to four digits."""


@dataclass(frozen=True)
class Likelihood:
    """-log p(x) of every image, by the flow of the model.

    Attributes:
        estimates: [B, probes], one estimate for each random probe of the trace; [B, 1] of the exact trace.
        unit: "bits/dim" (8-bit images, uniformly dequantised: an upper bound on average) or "nats/dim" (a density).
        trace: how the divergence was taken.
    """

    estimates: Tensor
    unit: str
    trace: Trace

    @property
    def value(self) -> Tensor:
        """The mean over probes, [B]."""
        return self.estimates.mean(1)

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's interval over the probes, two tensors [B]: how far the trace's estimate can be trusted.

        Raises:
            UserError: fewer than two probes have no standard deviation (the exact trace needs none).
        """
        if self.trace == "exact":
            return self.value, self.value
        probes = self.estimates.shape[1]
        if probes < 2:
            raise UserError("an interval needs at least two probes.", key="probes", code="missing")
        from scipy.stats import t as student

        reach = float(student.ppf(0.5 + confidence / 2, probes - 1)) / probes**0.5
        half = reach * self.estimates.std(1)
        return self.value - half, self.value + half

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        value = self.value.double()
        error = float(value.std() / len(value) ** 0.5) if len(value) > 1 else None
        dequantised = "uniform" if self.unit == "bits/dim" else None
        return {
            "unit": self.unit,
            "images": len(value),
            "mean": float(value.mean()),
            "standard_error": error,
            "trace": self.trace,
            "probes": self.estimates.shape[1],
            "dequantisation": dequantised,
        }


def flow_likelihood(
    model: DiffusionModel | Denoiser,
    images: Tensor,
    *,
    steps: int = 50,
    trace: Trace = "hutchinson",
    probes: int = 4,
    schedule: Schedule | None = None,
    condition: Condition | None = None,
    levels: int | Literal["model"] | None = "model",
    prior: Callable[[Tensor], Tensor] | None = None,
    noise: Noise | None = None,
    batch_size: int = 64,
) -> Likelihood:
    """-log p(x) of every image under the model's probability flow.

    Args:
        model: a pixel `DiffusionModel`, or a denoiser whose prediction is differentiable in x.
        images: [B, …] in [-1, 1].
        steps: of the Runge-Kutta method, each four predictions of the network and as many gradients a probe; the error
            falls as steps⁻⁴.
        trace: "hutchinson", with `probes` vectors of random signs, or "exact", with one gradient a dimension.
        probes: how many vectors, each kept along the whole path.
        schedule: of the denoiser; default: its attribute `schedule`.
        condition: what the model is conditioned on, one row or one for each image.
        levels: how many values a pixel has: the images are dequantised with uniform noise and the density turned
            into bits. None takes continuous data as it is, in nats.
        prior: ln p(x_T) [B] in nats, of x_T [B, …]; by default that of the noise that sampling starts from.
        noise: draw 0 dequantises, draw 1 holds the probes.
        batch_size: how many images are worked on at once.

    Raises:
        UserError: a latent model; images that do not have these levels; an unknown trace.
    """
    if trace not in get_args(Trace):
        raise UserError(f"there is no trace '{trace}': {nearest(trace, get_args(Trace))}", key="trace", code="unknown")
    if steps < 1 or probes < 1:
        raise UserError(
            "the flow needs at least one step and one probe.", key="steps" if steps < 1 else "probes", code="invalid"
        )
    denoiser, schedule, known = unpack(model, schedule)
    levels = known if levels == "model" else levels
    if levels is not None:
        check_levels(images, levels)
    flow, parts = _Flow(denoiser, schedule, steps, prior), []
    with evaluating(model):
        for batch in Conditioned.of(images, condition, noise).batches(batch_size):
            x = batch.images if levels is None else _dequantised(batch, levels)
            directions = None if trace == "exact" else _signs(batch.noise.at(1), x, probes)
            parts.append(flow.log_prob(x, batch.condition, directions))
    nats = -torch.cat(parts) / math.prod(images.shape[1:])
    if levels is None:
        return Likelihood(nats, "nats/dim", trace)
    # The probability of a bin of width 2/(levels - 1) is its mean density times its width.
    return Likelihood((nats - math.log(2 / (levels - 1))) / LN2, "bits/dim", trace)


def _dequantised(batch: Conditioned, levels: int) -> Tensor:
    """The images, distributed uniformly over the bins of their levels."""
    x = batch.images
    shift = batch.noise.at(0).uniform(x.shape, dtype=x.dtype, device=x.device) - 0.5
    return x + shift * (2 / (levels - 1))


def _signs(noise: Noise, x: Tensor, probes: int) -> Tensor:
    """Random signs, [probes, B, …]."""
    uniform = noise.uniform((len(x), probes, *x.shape[1:]), device=x.device)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(x.dtype).transpose(0, 1)


@dataclass(frozen=True)
class _Flow:
    """The flow of a denoiser from the clean image to the prior."""

    denoiser: Denoiser
    schedule: Schedule
    steps: int
    prior: Callable[[Tensor], Tensor] | None

    def log_prob(self, x0: Tensor, condition: Condition, directions: Tensor | None) -> Tensor:
        """ln p(x_0) in nats, [B, probes]."""
        low = float(self.schedule.log_snr(self.schedule.first_time))
        high = max(float(self.schedule.log_snr(self.schedule.final_time)), LEAST_LOG_SNR)
        # There and back: a table whose last level holds no signal may end before it.
        high = float(self.schedule.log_snr(self.schedule.time_at(high)))
        # Twice the steps: the method predicts at their middles too.
        log_snrs = torch.linspace(low, high, 2 * self.steps + 1, dtype=torch.float64)
        times: list[float] = self.schedule.time_at(log_snrs).tolist()

        def slope(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
            return self._slope(z, t, condition, directions)

        z, gained = self._leave(x0, times[0], condition, directions)
        step = (low - high) / 2 / self.steps
        for i in range(self.steps):
            start, middle, end = times[2 * i : 2 * i + 3]
            k1, d1 = slope(z, start)
            k2, d2 = slope(z + step / 2 * k1, middle)
            k3, d3 = slope(z + step / 2 * k2, middle)
            k4, d4 = slope(z + step * k3, end)
            z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            gained = gained + step / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        scale = self._scale(times[-1])
        return self._prior(scale * z, times[-1]).unsqueeze(1) + z[0].numel() * math.log(scale) + gained

    def _scale(self, t: float) -> float:
        """√(a² + s²), 1 for a variance-preserving schedule."""
        return math.hypot(*level(self.schedule, t))

    def _leave(self, x0: Tensor, t: float, condition: Condition, directions: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the clean image to the first level: z there, and what the density gained, [B, probes].

        The score is taken as constant in between, so that ε̂ grows with σ and half its end value counts.
        """
        alpha, sigma = level(self.schedule, t)
        scale = self._scale(t)
        eps, divergence = self._predict(alpha * x0, t, condition, directions)
        y = x0 + 0.5 * (sigma / alpha) * eps
        return y * (alpha / scale), 0.5 * sigma * divergence + x0[0].numel() * math.log(alpha / scale)

    def _slope(self, z: Tensor, t: float, condition: Condition, directions: Tensor | None) -> tuple[Tensor, Tensor]:
        """dz/du [B, …] and its divergence with respect to z [B, probes]."""
        scale = self._scale(t)
        fraction = level(self.schedule, t)[1] / scale
        eps, divergence = self._predict(scale * z, t, condition, directions)
        return fraction * (eps - fraction * z), fraction * scale * divergence - fraction**2 * z[0].numel()

    def _prior(self, x: Tensor, time: float) -> Tensor:
        """ln p(x_T) in nats, [B]."""
        if self.prior is not None:
            return self.prior(x)
        alpha, sigma = level(self.schedule, time)
        variance = 1.0 if abs(alpha**2 + sigma**2 - 1) < 1e-9 else sigma**2
        squares = x.flatten(1).square().sum(1) / variance
        return -0.5 * (squares + x[0].numel() * math.log(2 * math.pi * variance))

    def _predict(self, x: Tensor, t: float, condition: Condition, directions: Tensor | None) -> tuple[Tensor, Tensor]:
        """ε̂ at (x, t), and its divergence with respect to x, [B, probes]; [B, 1] of the exact trace."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            eps = self.denoiser(x, t, condition).eps
            values = []
            for probe in _basis(x) if directions is None else directions:
                (pulled,) = torch.autograd.grad(eps, x, probe, retain_graph=True)
                values.append((pulled * probe).flatten(1).sum(1))
        divergence = torch.stack(values, dim=1).detach()
        return eps.detach(), divergence.sum(1, keepdim=True) if directions is None else divergence


def _basis(x: Tensor) -> Tensor:
    """The unit vectors of one sample, each for the whole batch, [D, B, …]."""
    dimensions = x[0].numel()
    unit = torch.eye(dimensions, dtype=x.dtype, device=x.device).reshape(dimensions, 1, *x.shape[1:])
    return unit.expand(dimensions, *x.shape)
