"""The Fréchet distance between two normal distributions fitted to features (Heusel et al. 2017, equation 6).

    d² = |μ₁ - μ₂|² + Tr Σ₁ + Tr Σ₂ - 2 Tr (Σ₁Σ₂)^½

With the Cholesky factor Σ₂ = LLᵀ the last trace is the sum of the roots of the eigenvalues of the symmetric
LᵀΣ₁L. More generally it is the nuclear norm of F₁ᵀF₂ for any factors Σᵢ = FᵢFᵢᵀ; with as many rows as
dimensions or fewer, the centred data themselves are the factors, and nothing has to be regularised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, mean_interval
from carrara.evaluation.moments import Moments, Rows, Statistics, as_rows

Normal = Moments | Statistics
"""A normal distribution, by its mean and covariance."""


def frechet_distance(a: Normal | Rows, b: Normal | Rows) -> float:
    """The Fréchet distance between two sets, each given by its moments or by its features [N, D].

    Called FID only where the features are the 2015 Inception network's. It is biased upward by about 1/N:
    compare only equal N. No [D, D] matrix is made of a side that has no more rows than dimensions (docs/math.md §12).

    Returns:
        The squared distance d² of the paper (what everybody reports), ≥ 0, in float64.

    Raises:
        UserError: other dimensions, fewer than 2 rows, NaN.
    """
    return distance_to(b)(a)


def distance_to(reference: Normal | Rows) -> Callable[[Normal | Rows], float]:
    """The Fréchet distance to one reference, which is factored once for many samples."""
    fixed = normal(reference)
    return lambda samples: _distance(normal(samples), fixed)


def normal(given: Normal | Rows) -> Statistics:
    """The normal distribution of moments or of features [N, D].

    Raises:
        UserError: fewer than 2 rows, NaN.
    """
    if isinstance(given, Statistics):
        return given
    return (given if isinstance(given, Moments) else Moments.of(as_rows(given))).statistics()


def frechet_interval(
    samples: Rows, reference: Normal | Rows, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """A bootstrap interval of the Fréchet distance of samples [N, D] to a fixed reference.

    The bootstrap of the linearised distance: its value plus the mean influence of the rows drawn. Resampling
    the distance itself costs an eigenproblem a replicate and is worse: a resampled set holds fewer distinct
    rows, so its distances are too large and, for N of a few D, vary twice as much as those of fresh draws
    (the linearised ones 1.3 times: `tests/evaluation/test_frechet.py`).
    """
    rows, fixed = as_rows(samples, "samples").cpu(), normal(reference)
    own = normal(rows)
    value = _distance(own, fixed)
    found = mean_interval(value + _influence(rows, own, fixed), level, replicates, seed)
    return replace(found, low=max(0.0, found.low))


def _influence(rows: Tensor, own: Statistics, fixed: Statistics) -> Tensor:
    """How the distance of rows [N, D] moves with the weight of each, float64 [N], of mean 0.

    With c = x - μ₁ it is 2 (μ₁ - μ₂)·c + |c|² - cᵀTc, less its mean, where T carries the first normal
    distribution onto the second: for Σ₂ = FFᵀ and FᵀΣ₁F = VΛVᵀ, T = F V Λ^-½ Vᵀ Fᵀ, so that cᵀTc = |Λ^-¼ VᵀFᵀc|².
    """
    if own.wide:
        root = fixed.factor.T @ own.factor
        within = root @ root.T
    else:
        within = fixed.factor.T @ own.covariance @ fixed.factor
    values, vectors = torch.linalg.eigh(within)
    kept = values > 1e-12 * values.max().clamp_min(0) if len(values) else values > 0
    carry = fixed.factor @ (vectors[:, kept] * values[kept].pow(-0.25))
    centred = rows - own.mean
    carried = (centred @ carry).square().sum(1)
    influence: Tensor = 2 * centred @ (own.mean - fixed.mean) + centred.square().sum(1) - carried
    return influence - influence.mean()


def _distance(a: Statistics, b: Statistics) -> float:
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of dimensions {len(a.mean)} and {len(b.mean)} cannot be compared: "
            "take both from one feature network at one image size.",
            key="features",
            code="shape",
        )
    shift = float((a.mean - b.mean).square().sum())
    return max(0.0, shift + a.trace + b.trace - 2 * _root_trace(a, b))


def _root_trace(a: Statistics, b: Statistics) -> float:
    """Tr (Σ₁Σ₂)^½."""
    if not a.wide and b.cholesky is not None:
        values = _congruent_eigenvalues(b.cholesky, a.covariance)
        # A root loses half the digits of an eigenvalue near rounding; such cases go the slower way below.
        if values[0] > 1e-12 * values[-1]:
            return float(values.sqrt().sum())
    product = a.factor.T @ b.factor
    return float(torch.linalg.svdvals(product).sum()) if product.numel() else 0.0


def _congruent_eigenvalues(lower: Tensor, covariance: Tensor) -> Tensor:
    """The eigenvalues of LᵀΣL, ascending, float64 [D].

    LAPACK's `sygst` skips what is zero in L and what is mirrored: a quarter of the multiplications of two plain
    products. `syevd` without vectors is one reduction to three diagonals and little else.
    """
    from scipy.linalg import eigh, lapack

    product, _ = lapack.dsygst(covariance.numpy().T, lower.numpy().T, itype=2, lower=0)
    values = eigh(product, lower=False, eigvals_only=True, driver="evd", check_finite=False, overwrite_a=True)
    return torch.from_numpy(values)
