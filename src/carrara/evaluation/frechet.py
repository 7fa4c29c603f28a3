"""The Fréchet distance between two normal distributions fitted to features (Heusel et al. 2017, equation 6).

    d² = |μ₁ - μ₂|² + Tr Σ₁ + Tr Σ₂ - 2 Tr (Σ₁Σ₂)^½

For any factors Σᵢ = FᵢFᵢᵀ the last trace is the nuclear norm of F₁ᵀF₂. With Cholesky factors that is the sum
of the roots of the eigenvalues of one symmetric matrix; with as many rows as dimensions or fewer, the centred
data themselves are the factors, and nothing has to be regularised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, around, resamples
from carrara.evaluation.moments import Moments, Rows, Statistics, as_rows

EPSILON = torch.finfo(torch.float64).eps

Normal = Moments | Statistics
"""A normal distribution, by its mean and covariance."""


def frechet_distance(a: Normal | Rows, b: Normal | Rows) -> float:
    """The Fréchet distance between two sets, each given by its moments or by its features [N, D].

    Called FID only where the features are the 2015 Inception network's. It is biased upward by about 1/N:
    compare only equal N. Features are exact also with N ≤ D; moments of so few rows are factored by their
    eigenvectors instead, which costs some digits.

    Returns:
        The squared distance d² of the paper (what everybody reports), ≥ 0, in float64.

    Raises:
        UserError: other dimensions, fewer than 2 rows, NaN.
    """
    return _distance(_factored(a), _factored(b))


def frechet_interval(
    samples: Rows, reference: Normal | Rows, replicates: int = 50, level: float = 0.95, seed: int = 0
) -> Interval:
    """A bootstrap interval of the Fréchet distance of samples [N, D] to a fixed reference.

    Resampled sets hold fewer distinct rows and so lie farther away: only the spread of the replicates is
    used, laid around the value itself.
    """
    rows, fixed = as_rows(samples, "samples").cpu(), _factored(reference)
    drawn = [_distance(_factored(rows[index]), fixed) for index in resamples(len(rows), replicates, seed)]
    return around(_distance(_factored(rows), fixed), torch.tensor(drawn, dtype=torch.float64), level)


class _Factored(NamedTuple):
    """Mean [D], factor F [D, R] with Σ = FFᵀ, and whether F is the Cholesky factor of a well-posed Σ."""

    mean: Tensor
    factor: Tensor
    well_posed: bool


def _factored(side: Normal | Rows) -> _Factored:
    if not isinstance(side, Moments | Statistics):
        rows = as_rows(side).cpu()
        count, dimension = rows.shape
        if count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images a side, here {count}: add images.")
        if count <= dimension:
            mean = rows.mean(0)
            return _Factored(mean, (rows - mean).T / (count - 1) ** 0.5, well_posed=False)
        side = Moments.of(rows)
    statistics = side.statistics() if isinstance(side, Moments) else side
    mean, covariance = statistics.mean.double(), statistics.covariance.double()
    lower, failed = torch.linalg.cholesky_ex(covariance)
    floor = len(mean) * EPSILON * covariance.diagonal().max()
    if not failed and lower.diagonal().square().min() > floor:
        return _Factored(mean, lower, well_posed=True)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(mean) * EPSILON * values[-1].clamp_min(0)
    return _Factored(mean, vectors[:, kept] * values[kept].sqrt(), well_posed=False)


def _distance(a: _Factored, b: _Factored) -> float:
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of dimensions {len(a.mean)} and {len(b.mean)} cannot be compared: "
            "take both from one feature network at one image size."
        )
    shift = (a.mean - b.mean).square().sum()
    spread = a.factor.square().sum() + b.factor.square().sum()
    overlap = _nuclear_norm(a.factor.T @ b.factor, a.well_posed and b.well_posed)
    return max(0.0, float(shift + spread - 2 * overlap))


def _nuclear_norm(product: Tensor, well_posed: bool) -> Tensor:
    """The sum of the singular values of F₁ᵀF₂ [R₁, R₂]."""
    if well_posed:
        values: Tensor = torch.linalg.eigvalsh(product @ product.T)
        # A root loses half the digits of an eigenvalue near rounding; such cases go the slower way below.
        if values[0] > 1e-12 * values[-1]:
            return values.sqrt().sum()
    if 0 in product.shape:
        return product.new_zeros(())
    singular: Tensor = torch.linalg.svdvals(product)
    return singular.sum()
