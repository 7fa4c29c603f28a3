"""Fidelity and diversity apart, by k-nearest-neighbour balls around features.

Precision and recall: Kynkäänniemi et al. 2019, equations 1-2. Density and coverage: Naeem et al. 2020,
equations 4-5. Balls are closed: a distance equal to the radius is inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, mean_interval
from carrara.evaluation.kernel import as_pair
from carrara.evaluation.moments import Rows
from carrara.evaluation.products import Block, Nearest, Sets


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision: the fraction of samples inside the reference's balls. Recall: the reverse.

    The interval of precision resamples the samples, that of recall the reference images: each is a mean over
    those.
    """

    precision: float
    recall: float
    precision_interval: Interval
    recall_interval: Interval


@dataclass(frozen=True)
class DensityCoverage:
    """Density: how many reference balls hold a sample, over k (not bounded by 1). Coverage: the fraction of
    reference balls that hold a sample. Intervals as for precision and recall."""

    density: float
    coverage: float
    density_interval: Interval
    coverage_interval: Interval


def precision_recall(samples: Rows, reference: Rows, k: int = 3, seed: int = 0) -> PrecisionRecall:
    """Improved precision and recall of samples [N, D] against a reference [M, D]; the paper's k is 3."""
    return fidelity_diversity(samples, reference, k, k, seed)[0]


def density_coverage(samples: Rows, reference: Rows, k: int = 5, seed: int = 0) -> DensityCoverage:
    """Density and coverage of samples [N, D] against a reference [M, D]; the paper's k is 5."""
    return fidelity_diversity(samples, reference, k, k, seed)[1]


def fidelity_diversity(
    samples: Rows, reference: Rows, precision_k: int = 3, density_k: int = 5, seed: int = 0
) -> tuple[PrecisionRecall, DensityCoverage]:
    """All four from one pass over the distances.

    Raises:
        UserError: other dimensions, no more rows than neighbours, NaN.
    """
    sets = Sets.of(*as_pair(samples, reference))
    balls = Balls(sets, precision_k, density_k)
    sets.visit(balls)
    return balls.result(seed)


class Balls:
    """Which samples lie in which balls around the reference and the other way round, gathered block by block."""

    def __init__(self, sets: Sets, precision_k: int = 3, density_k: int = 5) -> None:
        k, x, y = max(precision_k, density_k), sets.samples, sets.reference
        if min(precision_k, density_k) < 1:
            raise UserError(
                f"k is {min(precision_k, density_k)}: at least 1 nearest neighbour is needed.", key="k", code="invalid"
            )
        if min(len(x), len(y)) <= k:
            raise UserError(
                f"{k} nearest neighbours need more than {k} images a side, here {len(x)} and {len(y)}.",
                key="n",
                code="missing",
            )
        self._ks = precision_k, density_k
        self._near = Nearest(x, "samples", precision_k), Nearest(y, "reference", k)
        self._radii: tuple[Tensor, Tensor, Tensor] | None = None
        self._inside, self._reached, self._covered = (
            torch.zeros(len(side), dtype=torch.bool, device=side.rows.device) for side in (x, y, y)
        )
        self._holding = x.rows.new_zeros(len(x))

    def visit(self, block: Block) -> None:
        """Nearest neighbours within both sets come first, then the balls they make."""
        squared = block.squared_distances()
        if block.which != "between":
            for near in self._near:
                near.visit(block, squared)
            return
        precision_k, density_k = self._ks
        if self._radii is None:
            own, others = self._near
            self._radii = own.radius(precision_k), others.radius(precision_k), others.radius(density_k)
        around_samples, precise, dense = self._radii
        held = squared <= dense[block.columns]
        self._inside[block.rows] |= (squared <= precise[block.columns]).any(1)
        self._reached[block.columns] |= (squared <= around_samples[block.rows, None]).any(0)
        self._holding[block.rows] += held.sum(1).double() / density_k
        self._covered[block.columns] |= held.any(0)

    def result(self, seed: int = 0) -> tuple[PrecisionRecall, DensityCoverage]:
        """The four shares, once all blocks were seen."""

        def share(values: Tensor) -> tuple[float, Interval]:
            return float(values.double().mean()), mean_interval(values, seed=seed)

        (precision, over_samples), (recall, over_reference) = share(self._inside), share(self._reached)
        (density, density_interval), (coverage, coverage_interval) = share(self._holding), share(self._covered)
        return (
            PrecisionRecall(precision, recall, over_samples, over_reference),
            DensityCoverage(density, coverage, density_interval, coverage_interval),
        )
