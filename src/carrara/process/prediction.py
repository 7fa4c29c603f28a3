"""What is known about the clean image at one time, and the forms in which networks predict it.

For any schedule x_t = a x_0 + s ε. A network may predict ε, x_0, v = a ε - s x_0 (Salimans & Ho 2022), the flow
velocity u = ε - x_0, EDM's F (Karras et al. 2022), or, in old checkpoints, the mean of x_{t-1}.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.devices import to_device
from carrara.errors import UserError
from carrara.process.schedules import Schedule, Time, level

Scale = float | Tensor
"""A signal or noise scale: one number for the batch, or a tensor that broadcasts against x."""


def scales(schedule: Schedule, t: Time, x: Tensor) -> tuple[Scale, Scale]:
    """(a(t), s(t)) ready to multiply x: two floats for a single time, else [B, 1, …] in x's type.

    Args:
        t: one time, or [B] of them.
        x: [B, …].
    """
    if not isinstance(t, Tensor) or t.ndim == 0:
        return level(schedule, float(t))
    shape = (-1, *[1] * (x.ndim - 1))
    alpha, sigma = (
        to_device(scale, x.device, x.dtype).reshape(shape) for scale in (schedule.alpha(t), schedule.sigma(t))
    )
    return alpha, sigma


def _vanishes(scale: Scale) -> bool:
    """Whether a scale is 0 for some sample; tensors on a device are not waited for."""
    if isinstance(scale, Tensor):
        return scale.device.type == "cpu" and bool((scale == 0).any())
    return scale == 0


def x0_of_eps(x: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """x_0 = (x - s ε)/a.

    Raises:
        UserError: a = 0, where ε does not determine the image.
    """
    if _vanishes(alpha):
        raise UserError(
            "ε-prediction is undefined where no signal is left (zero SNR): use a model that predicts v or x0, "
            "or a grid that starts at a less noisy time.",
            key="predicts",
            code="unsupported",
        )
    if isinstance(sigma, Tensor):
        return (x - sigma * eps) / alpha
    return torch.sub(x, eps, alpha=sigma) / alpha


def eps_of_x0(x: Tensor, x0: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """ε = (x - a x_0)/s.

    Raises:
        UserError: s = 0, where there is no noise to speak of.
    """
    if _vanishes(sigma):
        raise UserError(
            "there is no noise to predict at the clean point (t = 0): take a later time.",
            key="time",
            code="unsupported",
        )
    if isinstance(alpha, Tensor):
        return (x - alpha * x0) / sigma
    return torch.sub(x, x0, alpha=alpha) / sigma


@dataclass(frozen=True)
class Prediction:
    """What is known about the clean image at one time. Immutable: every change returns a consistent new one.

    Attributes:
        x: the noisy image, [B, …].
        alpha: a(t), a float or broadcastable against x.
        sigma: s(t), likewise.
        x0: the predicted clean image x̂_0, [B, …].
        eps: the predicted noise ε̂, [B, …]; x = alpha·x0 + sigma·eps always holds.
        variance_fraction: a learned variance's raw network output, [B, …], about -1..1; the fraction
            v = (raw + 1)/2 is taken for the transition (Nichol & Dhariwal 2021, eq. 15). Not clamped.
        pending: a guidance gradient w·∇ log p(y|x), [B, …], that has not been folded in: the ancestral solver
            adds Σ·pending to its mean (Dhariwal & Nichol 2021, algorithm 1), every other solver takes
            `folded()`.
        x0_variance: Var[x_0|x_t] per dimension, [B, …], where it is known (the exact oracle); a changed x̂_0 or
            ε̂ belongs to another distribution, whose variance is not known.
    """

    x: Tensor
    alpha: Scale
    sigma: Scale
    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None
    pending: Tensor | None = None
    x0_variance: Tensor | None = None

    @classmethod
    def from_x0(cls, x: Tensor, x0: Tensor, alpha: Scale, sigma: Scale, **known: Tensor | None) -> Prediction:
        """From x̂_0; `known` fills the optional fields."""
        return cls(x, alpha, sigma, x0, eps_of_x0(x, x0, alpha, sigma), **known)

    @classmethod
    def from_eps(cls, x: Tensor, eps: Tensor, alpha: Scale, sigma: Scale, **known: Tensor | None) -> Prediction:
        """From ε̂; `known` fills the optional fields."""
        return cls(x, alpha, sigma, x0_of_eps(x, eps, alpha, sigma), eps, **known)

    def with_x0(self, x0: Tensor) -> Prediction:
        """With another x̂_0 (a clip, a threshold), ε̂ derived again from it."""
        return replace(self, x0=x0, eps=eps_of_x0(self.x, x0, self.alpha, self.sigma), x0_variance=None)

    def with_eps(self, eps: Tensor) -> Prediction:
        """With another ε̂ (guidance), x̂_0 derived again from it."""
        return replace(self, eps=eps, x0=x0_of_eps(self.x, eps, self.alpha, self.sigma), x0_variance=None)

    def with_score(self, gradient: Tensor) -> Prediction:
        """With `gradient` [B, …] added to the score ∇ log p(x_t) = -ε̂/s: ε̂ ← ε̂ - s·gradient
        (Dhariwal & Nichol 2021, algorithm 2)."""
        return self.with_eps(self.eps - self.sigma * gradient)

    def folded(self) -> Prediction:
        """With the pending guidance folded into ε̂ and x̂_0; itself where nothing is pending."""
        if self.pending is None:
            return self
        return replace(self.with_score(self.pending), pending=None)


class Denoiser(Protocol):
    """Anything that predicts the clean image: a network with its schedule, the exact oracle, another denoiser
    wrapped by guidance."""

    def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
        """
        Args:
            x: the noisy image, [B, …].
            t: schedule time, a float or 0-d tensor for the whole batch, or [B].
            condition: what the model is conditioned on.
        """
        ...


class Guide(Protocol):
    """A rule that changes what a denoiser predicts: Denoiser -> Denoiser. Guides compose by calling them."""

    def __call__(self, denoiser: Denoiser) -> Denoiser: ...
