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

BLOCK = 2048


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance, in the units of the kernel (papers often print it times 1,000).

    Attributes:
        mean: the mean over the random subsets.
        spread: their standard deviation (ddof 0).
        full: the unbiased estimate from all rows; may be slightly negative.
        subset_size: how many rows a subset held, the smaller set's size where that is less than asked for.
        interval: bootstrap interval of `full` over the samples x, the reference y held fixed.
    """

    mean: float
    spread: float
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
    x, y = as_rows(x, "samples"), as_rows(y, "reference features")
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"features of dimensions {x.shape[1]} and {y.shape[1]} cannot be compared: "
            "take both from one feature network at one image size."
        )
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(f"a kernel distance needs at least 2 images a side, here {n} and {m}: add images.")
    size = min(subset_size, n, m)
    chosen_x, chosen_y = _subsets(n, m, subsets, size, seed)
    all_x, all_y = x.new_ones(1, n), x.new_ones(1, m)
    drawn = weights(n, replicates, seed).to(x)
    values = _weighted_mmd(
        x,
        y,
        torch.cat([all_x, chosen_x.to(x), drawn]),
        torch.cat([all_y, chosen_y.to(x), all_y.expand(replicates, m)]),
    ).cpu()
    full, parts, bootstrap = values.split([1, subsets, replicates])
    return KernelDistance(
        mean=float(parts.mean()),
        spread=float(parts.std(correction=0)),
        full=float(full),
        subset_size=size,
        interval=percentile(bootstrap, level),
    )


def _subsets(n: int, m: int, subsets: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indicators [subsets, n] and [subsets, m] of random subsets without replacement."""
    generator = torch.Generator().manual_seed(seed)
    chosen_x, chosen_y = torch.zeros(subsets, n), torch.zeros(subsets, m)
    for k in range(subsets):
        chosen_x[k, torch.randperm(n, generator=generator)[:size]] = 1
        chosen_y[k, torch.randperm(m, generator=generator)[:size]] = 1
    return chosen_x, chosen_y


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1]).pow_(3)


def _weighted_mmd(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The unbiased estimate [R] for each pair of row weights w [R, N] of x and v [R, M] of y."""
    cross = x.new_zeros(len(w))
    for i in range(0, len(x), BLOCK):
        for j in range(0, len(y), BLOCK):
            block = _kernel(x[i : i + BLOCK], y[j : j + BLOCK])
            cross += (w[:, i : i + BLOCK] @ block * v[:, j : j + BLOCK]).sum(1)
    return _within(x, w) + _within(y, v) - 2 * cross / (w.sum(1) * v.sum(1))


def _within(x: Tensor, w: Tensor) -> Tensor:
    """Σ_{i≠j} wᵢwⱼ k(xᵢ,xⱼ) / Σ_{i≠j} wᵢwⱼ for each row of weights, from the upper blocks alone."""
    total = x.new_zeros(len(w))
    for i in range(0, len(x), BLOCK):
        for j in range(i, len(x), BLOCK):
            block = _kernel(x[i : i + BLOCK], x[j : j + BLOCK])
            if i == j:
                block.fill_diagonal_(0)
            total += (w[:, i : i + BLOCK] @ block * w[:, j : j + BLOCK]).sum(1) * (1 if i == j else 2)
    return total / (w.sum(1).square() - w.square().sum(1))
