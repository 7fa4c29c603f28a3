"""Mean and covariance of features, streamed in float64.

Rows are gathered into blocks of fixed length before they are summed, so the result is the same, bit for
bit, however the stream was cut into batches. Each block is centred on its own mean and joined to the sums by
the update of Chan, Golub & LeVeque (1979): no difference of large numbers, whatever the offset of the
features. Memory is O(D²), independent of the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from carrara.distributed import gather
from carrara.errors import UserError

Rows = Tensor | np.ndarray
"""Features or images, one sample a row: [N, D] or [N, C, H, W], any number type."""

BLOCK = 1024
PANEL = 256
LARGEST = 16_384
"""Dimensions of which a covariance is kept: 2 GiB in float64. 64×64 RGB pixels have 12,288."""


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
        raise UserError(f"the {what} have shape {list(rows.shape)}: give one row for each of at least one image.")
    rows = rows.flatten(1)
    if not rows.sum(dtype=torch.float64).isfinite():  # one cheap pass; only then look closer
        good = torch.isfinite(rows).all(1)
        if not good.all():
            raise UserError(
                f"the {what} hold NaN or infinite numbers, first in row {int((~good).nonzero()[0])}: "
                "mend the images or the network that made them."
            )
    return rows


@dataclass(frozen=True)
class Statistics:
    """What the Fréchet distance needs to know of a set of features.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D], ddof 1.
        count: how many rows they were taken of; None where a file does not say (pytorch-fid, clean-fid, ADM).
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None


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

    Raises:
        UserError: more than `LARGEST` dimensions.
    """

    def __init__(self, dimension: int) -> None:
        if dimension > LARGEST:
            raise UserError(
                f"the features have {dimension:,} dimensions, more than the {LARGEST:,} of which a covariance is kept: "
                "choose a network with --features, or smaller images with --resolution.",
                key="features",
                code="resources",
            )
        self.dimension = dimension
        self._count = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)  # its lower triangle is valid
        self._block = torch.empty(0, dimension, dtype=torch.float64)
        self._waiting = 0

    @classmethod
    def of(cls, features: Rows) -> Moments:
        """The moments of features [N, D] (or images, flattened) that are all at hand."""
        rows = _checked(features)
        return cls(rows.shape[1]).update(rows)

    def update(self, features: Rows) -> Moments:
        """Adds a batch [B, D]; returns itself.

        Raises:
            UserError: another dimension than before, or NaN or infinite entries.
        """
        rows = _checked(features)
        if rows.shape[1] != self.dimension:
            raise UserError(
                f"features of dimension {rows.shape[1]} cannot join moments of dimension {self.dimension}: "
                "use one feature network and one image size throughout."
            )
        if len(self._block) == 0:
            self._block = torch.empty(BLOCK + 1, self.dimension, dtype=torch.float64)
        taken = 0
        while taken < len(rows):
            part = rows[taken : taken + BLOCK - self._waiting]
            self._block[self._waiting : self._waiting + len(part)] = part
            self._waiting += len(part)
            taken += len(part)
            if self._waiting == BLOCK:
                self._absorb()
        return self

    def merge(self, other: Moments) -> Moments:
        """Adds what another process or shard has gathered; returns itself.

        Equal to one stream over all rows to about 1e-13 relative (the blocks lie elsewhere), not bit for bit.
        """
        if other.dimension != self.dimension:
            raise UserError(f"moments of dimensions {self.dimension} and {other.dimension} cannot be merged.")
        self._absorb()
        other = other._settled()
        if other._count:
            _add_gram(self._scatter, self._join(other._mean, other._count)[None])
            self._scatter += other._scatter
        return self

    def over_processes(self, device: torch.device | str = "cpu") -> Moments:
        """The moments of all processes together, merged in rank order: the same on each, bit for bit.

        Every process must call it; one process alone gets its own.

        Args:
            device: where the process group exchanges tensors (a GPU under NCCL).
        """
        own = self._settled()
        state = torch.cat([torch.tensor([float(own._count)], dtype=torch.float64), own._mean, own._scatter.flatten()])
        total = Moments(self.dimension)
        for row in gather(state[None].to(device)).cpu():
            part = Moments(self.dimension)
            part._count, part._mean = int(row[0]), row[1 : 1 + self.dimension]
            part._scatter = row[1 + self.dimension :].reshape(self.dimension, self.dimension)
            total.merge(part)
        return total

    @property
    def count(self) -> int:
        """How many rows were seen."""
        return self._count + self._waiting

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        return self._settled()._mean

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
            raise UserError(f"a covariance needs at least 2 images, here {self.count}: add images.")
        settled = self._settled()
        lower = settled._scatter.tril().div_(self.count - 1)
        return Statistics(settled._mean, lower + lower.tril(-1).T, self.count)

    def _join(self, mean: Tensor, count: int) -> Tensor:
        """Moves count and mean to those of the union; returns the row whose square the scatter must gain."""
        total = self._count + count
        shift = mean - self._mean
        row: Tensor = shift * (self._count * count / total) ** 0.5
        self._mean = self._mean + shift * (count / total)
        self._count = total
        return row

    def _absorb(self) -> None:
        """Adds the waiting rows, in place, to mean and scatter."""
        if self._waiting:
            rows = self._block[: self._waiting]
            mean = rows.mean(0)
            rows -= mean
            self._block[self._waiting] = self._join(mean, self._waiting)
            _add_gram(self._scatter, self._block[: self._waiting + 1])
            self._waiting = 0

    def _settled(self) -> Moments:
        """Itself where nothing waits, else a copy that has absorbed the waiting rows: reading changes nothing."""
        if not self._waiting:
            return self
        copy = Moments(self.dimension)
        copy._count, copy._mean, copy._scatter = self._count, self._mean, self._scatter.clone()
        copy._block, copy._waiting = self._block[: self._waiting + 1].clone(), self._waiting
        copy._absorb()
        return copy
