"""The kernel distance (KID): the squared maximum mean discrepancy under k(x, y) = (x·y/D + 1)³.

Bińkowski et al. 2018, section 4. Unlike the Fréchet distance its estimate is unbiased, also for small N.
One pass over the kernel matrix, block by block, serves the full-set value, all the random subsets and all the
bootstrap replicates: each is a weighting w of the rows, and its unbiased estimate is

    Σ_{i≠j} wᵢwⱼ k(xᵢ,xⱼ) / Σ_{i≠j} wᵢwⱼ  +  the same over y  -  2 Σ wᵢvⱼ k(xᵢ,yⱼ) / (Σw·Σv).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, percentile, weights
from carrara.evaluation.moments import Rows, as_rows
from carrara.evaluation.products import Block, Sets


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance, in the units of the kernel (papers often print it times 1,000).

    Attributes:
        mean: the mean over the random subsets.
        std: their standard deviation (ddof 0).
        full: the unbiased estimate from all rows; may be slightly negative.
        subset_size: how many rows a subset had, the smaller set's size where that is less than requested.
        interval: bootstrap interval of `full` over the samples x, the reference y held fixed.
    """

    mean: float
    std: float
    full: float
    subset_size: int
    interval: Interval


def kernel_distance(
    x: Rows,
    y: Rows,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    replicates: int = 200,
    level: float = 0.95,
) -> KernelDistance:
    """The unbiased squared MMD between samples x [N, D] and a reference y [M, D], in float64.

    Raises:
        UserError: other dimensions, fewer than 2 rows, NaN.
    """
    sets = Sets.of(*as_pair(x, y))
    estimate = KernelEstimate(sets, subsets, subset_size, seed, replicates)
    sets.visit(estimate)
    return estimate.result(level)


def as_pair(x: Rows, y: Rows) -> tuple[Tensor, Tensor]:
    """Samples and reference as float64 matrices of one dimension.

    Raises:
        UserError: other dimensions, NaN, no rows.
    """
    a, b = as_rows(x, "samples"), as_rows(y, "reference features")
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"features of dimensions {a.shape[1]} and {b.shape[1]} cannot be compared: "
            "take both from one feature network at one image size.",
            key="features",
            code="shape",
        )
    return a, b


class KernelEstimate:
    """The estimate of all rows, of random subsets and of bootstrap replicates, gathered block by block.

    Each is a weighting of the samples w [R, N] with one of the reference v [R, M]; the replicates hold the
    reference fixed, so that only the first rows of v differ.
    """

    def __init__(
        self, sets: Sets, subsets: int = 100, subset_size: int = 1000, seed: int = 0, replicates: int = 200
    ) -> None:
        n, m = len(sets.samples), len(sets.reference)
        if min(n, m) < 2:
            raise UserError(
                f"a kernel distance needs at least 2 images a side, here {n} and {m}: add images.",
                key="n",
                code="missing",
            )
        if subset_size < 2:
            raise UserError(
                f"subset_size is {subset_size}: an unbiased kernel distance needs at least 2 images.",
                key="subset_size",
                code="invalid",
            )
        self.size, self._sets = min(subset_size, n, m), sets
        self._counts = (1, subsets, replicates)
        chosen_x, chosen_y = _subsets(n, m, subsets, self.size, seed)
        like = sets.samples.rows
        self._w = torch.cat([like.new_ones(1, n), chosen_x.to(like), weights(n, replicates, seed).to(like)])
        self._v = torch.cat([like.new_ones(1, m), chosen_y.to(like)])
        self._sums = {
            "samples": like.new_zeros(len(self._w)),
            "reference": like.new_zeros(len(self._v)),
            "between": like.new_zeros(len(self._w)),
        }

    def visit(self, block: Block) -> None:
        """Add Σ wᵢvⱼ k(xᵢ, yⱼ) of a block, without the pairs of a row with itself."""
        kernel = self._kernel(block)
        first = self._v if block.which == "reference" else self._w
        part = first[:, block.rows] @ kernel
        if block.which == "between":
            second = self._fixed(self._v[:, block.columns])
            self._sums[block.which] += (part * second).sum(1)
            return
        if block.diagonal:
            part -= first[:, block.rows] * kernel.diagonal()
        # A block above the diagonal stands for the one below it, too.
        self._sums[block.which] += (part * first[:, block.columns]).sum(1) * (1 if block.diagonal else 2)

    def result(self, level: float = 0.95) -> KernelDistance:
        """The distance, once all blocks were seen."""
        w, v = self._w, self._v
        within = self._sums["samples"] / (w.sum(1).square() - w.square().sum(1))
        others = self._fixed(self._sums["reference"] / (v.sum(1).square() - v.square().sum(1)))
        cross = self._sums["between"] / (w.sum(1) * self._fixed(v.sum(1)))
        full, parts, bootstrap = (within + others - 2 * cross).cpu().split(self._counts)
        return KernelDistance(
            mean=float(parts.mean()),
            std=float(parts.std(correction=0)),
            full=float(full),
            subset_size=self.size,
            interval=percentile(bootstrap, level),
        )

    def _fixed(self, values: Tensor) -> Tensor:
        """Values for each row of v [S, …] as values for each row of w [R, …]: the replicates take the first."""
        return torch.cat([values, values[:1].expand(self._counts[2], *values.shape[1:])])

    def _kernel(self, block: Block) -> Tensor:
        """(x·y/D + 1)³."""
        dimension = block.first.rows.shape[1]
        along = block.first.along[block.rows, None] + (
            block.second.along[None, block.columns] + self._sets.centre_square
        )
        return along.add_(block.products).div_(dimension).add_(1).pow_(3)


def _subsets(n: int, m: int, subsets: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indicators [subsets, n] and [subsets, m] of random subsets without replacement."""
    generator = torch.Generator().manual_seed(seed)
    chosen_x, chosen_y = torch.zeros(subsets, n), torch.zeros(subsets, m)
    for k in range(subsets):
        chosen_x[k, torch.randperm(n, generator=generator)[:size]] = 1
        chosen_y[k, torch.randperm(m, generator=generator)[:size]] = 1
    return chosen_x, chosen_y
