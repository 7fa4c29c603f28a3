"""The exact oracle: a Gaussian mixture, whose denoiser and noisy classifier have no model error (docs/math.md §13).

For x_0 ~ Σ π_k N(m_k, v_k I): x_t ~ Σ π_k N(a m_k, (a² v_k + s²) I). Score, E[x_0|x_t], Var[x_0|x_t], p(y|x_t) and
the likelihood are closed forms, so that what a solver or a guide gets wrong is its own error.

Everything is computed in float64 and given back in x's type: near the clean image the class posterior turns on
differences that float32 does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.noise import Noise
from carrara.process.prediction import Prediction, Scale, scales
from carrara.process.schedules import Schedule, Time


class GaussianMixture:
    """A mixture of isotropic Gaussians over images (or vectors) of any shape.

    Example:
        A guidance rule, tried against the exact answer: eight modes of 1×4×4 "images" in two classes.

        >>> means = 2 * Noise(seed=1).normal((8, 1, 4, 4), dtype=torch.float64)
        >>> mixture = GaussianMixture([1] * 8, means, [0.05] * 8, labels=[0, 0, 0, 0, 1, 1, 1, 1])
        >>> schedule = schedules.cosine(1000)
        >>> denoiser = mixture.denoiser(schedule)                    # no model error
        >>> guided = classifier_guidance(mixture.classifier(schedule), scale=1.0, label=0)(denoiser)
        >>> x_T = Noise(seed=2).normal((500, 1, 4, 4), dtype=torch.float64)
        >>> x0 = solve(guided, schedule, DDIM(), grids.trailing(schedule, 50), x_T)
        >>> mixture.log_prob(x0, condition=Condition(label=torch.zeros(1, dtype=torch.int64))).mean()

    What is left between that and the entropy of the class is the error of the rule and of the solver.

    Args:
        weights: [K], positive; normalised here.
        means: [K, *shape].
        variances: [K], positive (0 is a point mass).
        labels: [K] class of every component, 0..classes-1; several components may share a class. None gives each
            component its own.

    Raises:
        UserError: the numbers of components differ, or a weight or variance is out of range.
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        means: Tensor,
        variances: Tensor | Sequence[float],
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.variances = torch.as_tensor(variances, dtype=torch.float64)
        if self.means.ndim < 2:
            raise UserError("a mixture's means are [K, *shape], of at least one dimension.", key="means", code="shape")
        components = self.means.shape[0]
        own = torch.arange(components)
        self.labels = own if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if not self.weights.shape == self.variances.shape == self.labels.shape == (components,):
            raise UserError(
                f"a mixture of {components} means needs as many weights, variances and labels.",
                key="weights",
                code="shape",
            )
        if not bool((self.weights > 0).all()) or not bool((self.variances >= 0).all()):
            raise UserError("a mixture's weights must be positive and its variances not negative.", key="weights")
        self.weights = self.weights / self.weights.sum()
        self.classes = int(self.labels.max()) + 1
        self.shape = tuple(self.means.shape[1:])

    def denoiser(self, schedule: Schedule) -> OracleDenoiser:
        """The exact denoiser under a schedule."""
        return OracleDenoiser(self, schedule)

    def classifier(self, schedule: Schedule) -> OracleClassifier:
        """The exact noisy classifier under a schedule."""
        return OracleClassifier(self, schedule)

    def component_log_probs(
        self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0, condition: Condition | None = None
    ) -> Tensor:
        """ln π_k N(x; a m_k, (a² v_k + s²) I), float64 [B, K], at the level (a, s).

        Labels of the condition leave only their class's components (ln p(x, k | y)); a label equal to `classes`
        leaves all. A condition vector c, broadcast over the shape, shifts every mean to m_k + c.
        """
        x = x.double()
        a, s = _column(alpha, x), _column(sigma, x)
        means, weights = self.means.to(x).flatten(1), self.weights.to(x)
        variance = a**2 * self.variances.to(x) + s**2  # [B or 1, K]
        centred = (x - _shift(alpha, condition, x)).flatten(1)
        squares = (centred**2).sum(1, keepdim=True) - 2 * a * (centred @ means.T) + a**2 * (means**2).sum(1)
        dimensions = means.shape[1]
        logs = weights.log() - squares.clamp(min=0) / (2 * variance) - dimensions / 2 * (2 * math.pi * variance).log()
        return logs + self._allowed(condition, x)

    def _allowed(self, condition: Condition | None, x: Tensor) -> Tensor:
        """0 where a component belongs to the requested label, -inf elsewhere, minus ln p(y); [B or 1, K]."""
        if condition is None or condition.label is None:
            return torch.zeros(1, len(self.labels)).to(x)
        label = condition.label.reshape(-1, 1)
        belongs = (label.cpu() == self.labels) | (label.cpu() == self.classes)
        if not bool(belongs.any(1).all()):
            raise UserError(
                f"the mixture has the classes 0..{self.classes - 1} ({self.classes} is the null label).", key="label"
            )
        share = (belongs * self.weights).sum(1, keepdim=True)
        return torch.where(belongs, 0.0, -torch.inf).to(x) - share.log().to(x)

    def log_prob(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0, condition: Condition | None = None) -> Tensor:
        """ln p(x) in nats, [B]; of the noisy marginal at the level (a, s) where one is given."""
        return torch.logsumexp(self.component_log_probs(x, alpha, sigma, condition), dim=1).to(x.dtype)

    def sample(self, n: int, noise: Noise | None = None, condition: Condition | None = None) -> Tensor:
        """`n` exact draws of x_0, float64 [n, *shape]."""
        noise = noise or Noise()
        probabilities = (self.weights.log() + self._allowed(condition, self.weights)).exp().expand(n, -1)
        chosen = (noise.uniform((n, 1), sub=1) > probabilities.cumsum(1)).sum(1).clamp(max=len(self.weights) - 1)
        spread = self.variances[chosen].sqrt().reshape(-1, *[1] * len(self.shape))
        draws = self.means[chosen] + spread * noise.normal((n, *self.shape), dtype=torch.float64)
        return draws + _shift(1.0, condition, draws)


def _column(scale: Scale, x: Tensor) -> Tensor:
    """A scale as [B, 1] (or [1, 1])."""
    return torch.as_tensor(scale, dtype=x.dtype, device=x.device).reshape(-1, 1)


def _shift(alpha: Scale, condition: Condition | None, x: Tensor) -> Tensor | float:
    """a·c for a condition vector c [B, D], D the number of dimensions of a sample; 0 without one."""
    if condition is None or condition.vector is None:
        return 0.0
    return alpha * condition.vector.to(x).reshape(-1, *x.shape[1:])


@dataclass(frozen=True)
class OracleDenoiser:
    """E[x_0|x_t] and Var[x_0|x_t] of a mixture, as a `Denoiser`. Differentiable in x and in the vector."""

    mixture: GaussianMixture
    schedule: Schedule

    def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
        wide = x.double()
        alpha, sigma = scales(self.schedule, t, wide)
        mixture, a, s = self.mixture, _column(alpha, wide), _column(sigma, wide)
        posterior = mixture.component_log_probs(wide, alpha, sigma, condition).softmax(1)  # p(k|x_t), [B, K]
        variance = mixture.variances.to(wide)
        total = a**2 * variance + s**2  # [B or 1, K]
        gain, rest = a * variance / total, s**2 / total
        # E[x_0|x_t, k] = m_k + gain_k (x - a m_k) = gain_k x + rest_k m_k: linear in x, so the mixture over k never
        # needs [B, K, D].
        means = mixture.means.to(wide).flatten(1)
        shift = _shift(1.0, condition, wide)
        centred = (wide - alpha * shift).flatten(1)
        slope = (posterior * gain).sum(1, keepdim=True)
        x0 = slope * centred + (posterior * rest) @ means
        # Var[x_0|x_t] = E_k[own variance] + E_k[mean_k²] - x0², per dimension.
        own = (posterior * variance * rest).sum(1, keepdim=True)
        square = (posterior * gain**2).sum(1, keepdim=True) * centred**2
        cross = 2 * centred * ((posterior * gain * rest) @ means)
        between = square + cross + (posterior * rest**2) @ means**2 - x0**2
        clean = (x0.reshape(x.shape) + shift).to(x.dtype)
        spread = (own + between.clamp(min=0)).reshape(x.shape).to(x.dtype)
        return Prediction.from_x0(x, clean, *scales(self.schedule, t, x), x0_variance=spread)


@dataclass(frozen=True)
class OracleClassifier:
    """ln p(y|x_t) of a mixture: `(x, t) -> logits` [B, classes], differentiable in x."""

    mixture: GaussianMixture
    schedule: Schedule

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        logs = self.mixture.component_log_probs(x, *scales(self.schedule, t, x.double()))
        classes = range(self.mixture.classes)
        joint = [torch.logsumexp(logs[:, self.mixture.labels.to(x.device) == y], dim=1) for y in classes]
        return torch.log_softmax(torch.stack(joint, dim=1), dim=1).to(x.dtype)
