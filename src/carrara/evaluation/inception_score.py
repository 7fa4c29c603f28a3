"""The Inception score (Salimans et al. 2016): exp of the mutual information of image and predicted class.

IS = exp( E_x KL( p(y|x) ‖ p(y) ) )
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from carrara.errors import UserError
from carrara.evaluation.bootstrap import Interval, around, weights
from carrara.evaluation.moments import Rows, as_rows


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (ddof 1) over the splits, the value from all rows at once, and the
    bootstrap interval of the latter. Between 1 and the number of classes."""

    mean: float
    std: float
    full: float
    interval: Interval


def inception_score(
    logits: Rows, splits: int = 10, seed: int = 0, replicates: int = 200, level: float = 0.95
) -> InceptionScore:
    """The Inception score of class logits [N, K], shuffled by `seed` and cut into `splits` equal parts.

    Called by this name only with the logits of the 2015 Inception network (without its bias).
    """
    log_p = as_rows(logits, "logits").cpu().log_softmax(1)
    if len(log_p) < splits:
        raise UserError(
            f"an Inception score in {splits} splits needs at least as many images, here {len(log_p)}.",
            key="splits",
            code="missing",
        )
    order = torch.randperm(len(log_p), generator=torch.Generator().manual_seed(seed))
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(1)

    def score(weight: torch.Tensor) -> torch.Tensor:
        """The score [R] for each weighting [R, N] of the rows."""
        weight = weight / weight.sum(1, keepdim=True)
        marginal = weight @ p
        return (weight @ negative_entropy - torch.xlogy(marginal, marginal).sum(1)).exp()

    parts = torch.zeros(splits, len(log_p), dtype=torch.float64)
    for number, index in enumerate(order.chunk(splits)):
        parts[number, index] = 1
    scores = score(parts)
    full = float(score(torch.ones(1, len(log_p), dtype=torch.float64)))
    drawn = score(weights(len(log_p), replicates, seed))
    std = float(scores.std()) if splits > 1 else 0.0
    return InceptionScore(float(scores.mean()), std, full, around(full, drawn, level))
