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
from carrara.evaluation.moments import Rows, as_rows
from carrara.evaluation.neighbours import radii, squared_distances


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision: the share of samples inside the reference's balls. Recall: the reverse.

    The interval of precision resamples the samples, that of recall the reference images: each is a mean over
    those.
    """

    precision: float
    recall: float
    precision_interval: Interval
    recall_interval: Interval


@dataclass(frozen=True)
class DensityCoverage:
    """Density: how many reference balls hold a sample, over k (not bounded by 1). Coverage: the share of
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
    x, y = _pair(samples, reference, max(precision_k, density_k))
    (radius_x,) = radii(x, precision_k)
    precise_y, dense_y = radii(y, precision_k, density_k)
    inside, holding = x.new_empty(len(x)), x.new_empty(len(x))
    reached, covered = (torch.zeros(len(y), dtype=torch.bool, device=x.device) for _ in range(2))
    for part, squared in squared_distances(x, y):
        inside[part] = (squared <= precise_y).any(1).double()
        reached |= (squared <= radius_x[part, None]).any(0)
        held = squared <= dense_y
        holding[part] = held.sum(1).double() / density_k
        covered |= held.any(0)

    def share(values: Tensor) -> tuple[float, Interval]:
        return float(values.double().mean()), mean_interval(values, seed=seed)

    (precision, over_samples), (recall, over_reference) = share(inside), share(reached)
    (density, density_interval), (coverage, coverage_interval) = share(holding), share(covered)
    return (
        PrecisionRecall(precision, recall, over_samples, over_reference),
        DensityCoverage(density, coverage, density_interval, coverage_interval),
    )


def _pair(samples: Rows, reference: Rows, k: int) -> tuple[Tensor, Tensor]:
    x, y = as_rows(samples, "samples"), as_rows(reference, "reference features")
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"features of dimensions {x.shape[1]} and {y.shape[1]} cannot be compared: "
            "take both from one feature network at one image size."
        )
    if min(len(x), len(y)) <= k:
        raise UserError(f"{k} nearest neighbours need more than {k} images a side, here {len(x)} and {len(y)}.")
    return x, y
