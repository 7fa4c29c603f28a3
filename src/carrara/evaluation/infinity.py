"""The Fréchet distance that infinitely many samples would have, with its error bar.

With N samples the distance is too large by c/N to first order (Chong & Forsyth 2020, equation 2), so a better
model with fewer samples can look worse. They fit a line in 1/N; here the line goes through N and the G sets of
N(1 - 1/G) that leave one group out, which is the delete-a-group jackknife (Quenouille 1956): the same
extrapolation, and its variance for free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval
from carrara.evaluation.frechet import distance_to
from carrara.evaluation.moments import Moments, Rows, Statistics, as_rows


@dataclass(frozen=True)
class Extrapolation:
    """The distance at infinite N; may be slightly negative, as an unbiased estimate of 0 must be.

    Attributes:
        value: the extrapolated distance.
        interval: its jackknife interval, with Student's t for G - 1 degrees of freedom.
        finite: the distance of the N samples at hand.
        slope: c of c/N.
    """

    value: float
    interval: Interval
    finite: float
    slope: float


def frechet_infinity(
    samples: Rows, reference: Moments | Statistics, groups: int = 10, level: float = 0.95, seed: int = 0
) -> Extrapolation:
    """Extrapolates the Fréchet distance of samples [N, D] to a fixed reference to infinite N.

    The reference's own finite size is not extrapolated: it belongs to the protocol.

    Raises:
        UserError: no more samples than dimensions (with a group left out), where the bias is not c/N.
    """
    rows = as_rows(samples, "samples").cpu()
    count, dimension = rows.shape
    fewest = count - -(-count // groups)
    if fewest <= dimension:
        raise UserError(
            f"extrapolating needs more than {dimension} samples with a {groups}th left out, here {fewest}: "
            "add samples, or use features of fewer dimensions.",
            key="n",
            code="missing",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    total = Moments.of(rows).statistics()
    parts = (_statistics(rows[index]) for index in order.tensor_split(groups))
    to_reference = distance_to(reference)
    finite = to_reference(total)
    without = torch.tensor([to_reference(left_out(total, part)) for part in parts], dtype=torch.float64)
    value = groups * finite - (groups - 1) * float(without.mean())
    error = float(((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt())
    reach = _student(level, groups - 1) * error
    slope = count * (groups - 1) * (float(without.mean()) - finite)
    return Extrapolation(value, Interval(value - reach, value + reach, level, groups), finite, slope)


def _statistics(rows: Tensor) -> Statistics:
    """Those of a group, which may be of one row."""
    if len(rows) > 1:
        return Moments.of(rows).statistics()
    return Statistics(rows[0], torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64), 1)


def left_out(total: Statistics, part: Statistics) -> Statistics:
    """The statistics of all rows but those of a part: the update of Chan, Golub & LeVeque backwards.

    The part is a small fraction, so that no more than a digit is lost.
    """
    assert total.count is not None
    assert part.count is not None
    count = total.count - part.count
    mean = (total.count * total.mean - part.count * part.mean) / count
    shift = part.mean - mean
    scatter = (total.count - 1) * total.covariance
    scatter.sub_(part.covariance, alpha=part.count - 1).addr_(shift, shift, alpha=-count * part.count / total.count)
    return Statistics(mean, scatter.div_(count - 1), count)


def _student(level: float, freedom: int) -> float:
    """The half width in standard errors of a two-sided interval."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, freedom))
