"""Mean and covariance of features, streamed in float64.

As long as there are no more rows than dimensions the rows themselves are kept: they are less than their covariance, and
exact. More of them are gathered into blocks of fixed length before they are summed, so that the result is the same, bit
for bit, however the stream was cut into batches. Each block is centred on its own mean and joined to the sums by the
update of Chan, Golub & LeVeque (1979): no difference of large numbers, whatever the offset of the features. Memory is
min(N, D)·D numbers.
"""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from carrara.errors import UserError

Rows = Tensor | np.ndarray
"""Features or images, one sample a row: [N, D] or [N, C, H, W], any number type."""

BLOCK = 1024
PANEL = 256
LARGEST = 16_384
"""Dimensions of which a covariance is kept: 2 GiB in float64. 64×64 RGB pixels have 12,288. Of fewer rows than
dimensions at most as many numbers are kept: 1,365 pictures of 256×256 RGB pixels."""
EPSILON = torch.finfo(torch.float64).eps


def as_rows(values: Rows, what: str = "features") -> Tensor:
    """The rows as a float64 matrix [N, D] where they lie (images are flattened), checked to be usable.

    Raises:
        UserError: no rows, or NaN or infinite entries.
    """
    return _checked(values, what).double()


def _checked(values: Rows, what: str = "features") -> Tensor:
    """The rows as a matrix [N, D] of their own number type, without NaN or infinite entries."""
    rows = torch.as_tensor(values)
    if rows.ndim < 2 or rows.shape[0] == 0:
        raise UserError(
            f"the {what} have shape {list(rows.shape)}: give one row for each of at least one image.",
            key=what,
            code="shape",
        )
    rows = rows.flatten(1)
    if not rows.sum(dtype=torch.float64).isfinite():  # one cheap pass; only then look closer
        good = torch.isfinite(rows).all(1)
        if not good.all():
            raise UserError(
                f"the {what} contain NaN or infinite numbers, first in row {int((~good).nonzero()[0])}: "
                "fix the images or the network that made them.",
                key=what,
                code="not_finite",
            )
    return rows


class Statistics:
    """A normal distribution fitted to features: all that the Fréchet distance needs to know of them.

    Attributes:
        mean: float64 [D].
        count: how many rows it was fitted to; None where a file does not contain it (pytorch-fid, clean-fid, ADM).
        factor: float64 [D, R] with Σ = factor·factorᵀ, without the directions in which Σ is zero to rounding.
        wide: whether there are no more rows than dimensions, so that `factor` is the centred rows over √(N - 1) and no
            [D, D] matrix is needed.
    """

    def __init__(
        self, mean: Tensor, covariance: Tensor | None, count: int | None = None, factor: Tensor | None = None
    ) -> None:
        """Exactly one of the covariance, [D, D], and a factor of it, [D, N], is given."""
        self.mean, self.count, self.wide = mean.double(), count, factor is not None
        if factor is not None:
            self.factor = factor
        if covariance is not None:
            self.covariance = covariance.double()

    @cached_property
    def covariance(self) -> Tensor:
        """Σ, float64 [D, D], ddof 1."""
        return self.factor @ self.factor.T

    @cached_property
    def trace(self) -> float:
        """Tr Σ."""
        return float(self.factor.square().sum() if self.wide else self.covariance.trace())

    @cached_property
    def cholesky(self) -> Tensor | None:
        """The lower triangular factor of a well-posed Σ; None of any other."""
        if self.wide:
            return None
        from scipy.linalg import lapack

        # A C-ordered matrix is its transpose in LAPACK's order: its upper factor is the lower one here.
        upper, failed = lapack.dpotrf(self.covariance.numpy().T, lower=0)
        lower = torch.from_numpy(upper.T)
        floor = len(self.mean) * EPSILON * self.covariance.diagonal().max()
        well_posed = failed == 0 and bool(lower.diagonal().square().min() > floor)
        return lower if well_posed else None

    @cached_property
    def factor(self) -> Tensor:
        """F [D, R] with Σ = FFᵀ: Cholesky's, or of a singular Σ the scaled eigenvectors."""
        if self.cholesky is not None:
            return self.cholesky
        values, vectors = torch.linalg.eigh(self.covariance)
        positive = values > len(self.mean) * EPSILON * values[-1].clamp_min(0)
        factor: Tensor = vectors[:, positive] * values[positive].sqrt()
        return factor


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """total += rowsᵀ rows, panel by panel of the lower triangle only: about half the multiplications."""
    for start in range(0, total.shape[0], PANEL):
        stop = start + PANEL
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


class Moments:
    """Running mean and covariance (ddof 1) of a stream of feature batches, on the CPU in float64.

    ```python
    moments = Moments(2048)
    for batch in batches:
        moments.update(features(batch))
    moments.mean, moments.covariance, moments.count
    ```

    Args:
        dimension: D.
        expected: how many rows will come, so that too many are refused before the first.

    Raises:
        UserError: more numbers than a covariance of `LARGEST` dimensions has, at once or as soon as they are too many.
    """

    def __init__(self, dimension: int, expected: int = 0) -> None:
        self.dimension, self.count = dimension, 0
        self._refuse_too_many(expected)
        self._summed = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter: Tensor | None = None  # its lower triangle is valid; None while the rows are kept
        self._waiting: list[Tensor] = []

    @classmethod
    def of(cls, features: Rows) -> Moments:
        """The moments of features [N, D] (or images, flattened) that are all at hand."""
        rows = _checked(features)
        return cls(rows.shape[1]).update(rows)

    def update(self, features: Rows) -> Moments:
        """Adds a batch [B, D]; returns itself.

        Raises:
            UserError: another dimension than before, NaN or infinite entries, or too many numbers.
        """
        rows = _checked(features)
        if rows.shape[1] != self.dimension:
            raise UserError(
                f"features of dimension {rows.shape[1]} cannot join moments of dimension {self.dimension}: "
                "use one feature network and one image size throughout.",
                key="features",
                code="shape",
            )
        self._refuse_too_many(self.count + len(rows))
        self._waiting.append(rows.detach().cpu().clone())
        self.count += len(rows)
        if self.count > self.dimension and self.count - self._summed >= BLOCK:
            self._sum_up(BLOCK)
        return self

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        return self.statistics().mean

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], ddof 1, exactly symmetric."""
        return self.statistics().covariance

    def statistics(self) -> Statistics:
        """Mean, covariance and count, frozen.

        Raises:
            UserError: fewer than 2 rows.
        """
        if self.count < 2:
            raise UserError(
                f"a covariance needs at least 2 images, here {self.count}: add images.", key="n", code="missing"
            )
        if self.count <= self.dimension:
            rows = torch.cat(self._waiting).double()
            mean = rows.mean(0)
            return Statistics(mean, None, self.count, (rows - mean).T / (self.count - 1) ** 0.5)
        summed = copy.copy(self)  # reading changes nothing
        summed._scatter = None if self._scatter is None else self._scatter.clone()
        summed._sum_up(1)
        assert summed._scatter is not None
        lower = summed._scatter.tril_().div_(self.count - 1)
        return Statistics(summed._mean, lower + lower.tril(-1).T, self.count)

    def _refuse_too_many(self, count: int) -> None:
        numbers = min(count, self.dimension) * self.dimension
        if numbers > LARGEST**2:
            raise UserError(
                f"{count:,} images with features of {self.dimension:,} dimensions take more memory than the "
                f"{LARGEST**2 * 8 / 2**30:g} GiB that are meant for them: choose a network with --features, or smaller "
                "images with --resolution, or fewer with --n.",
                key="features",
                code="resources",
            )

    def _sum_up(self, fewest: int) -> None:
        """Adds the waiting rows to mean and scatter, block by block; a last one of less than `fewest` rows waits on."""
        if self._scatter is None:
            self._scatter = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)
        rows, self._waiting = torch.cat(self._waiting) if self._waiting else torch.empty(0), []
        for block in rows.split(BLOCK):
            if len(block) < fewest:
                self._waiting = [block.clone()]
            elif len(block):
                self._add(block.double())

    def _add(self, rows: Tensor) -> None:
        assert self._scatter is not None
        mean = rows.mean(0)
        total = self._summed + len(rows)
        shift = mean - self._mean
        row = shift * (self._summed * len(rows) / total) ** 0.5
        self._mean = self._mean + shift * (len(rows) / total)
        self._summed = total
        _add_gram(self._scatter, torch.cat([rows - mean, row[None]]))
