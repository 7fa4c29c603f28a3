"""One mixture for all proofs: two classes of two components each, far from symmetric, in two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process import GaussianMixture, schedules

SCHEDULE = schedules.linear(1000)
MIXTURE = GaussianMixture(
    weights=[0.1, 0.3, 0.4, 0.2],
    means=torch.tensor([[-1.0, 0.5], [1.0, 0.8], [0.2, -1.0], [-0.7, -0.6]]),
    variances=[0.02, 0.04, 0.03, 0.05],
    labels=[0, 0, 1, 1],
)
NULL = Condition(label=torch.tensor([MIXTURE.classes]))


def labelled(label: int) -> Condition:
    """The condition of one class for the whole batch."""
    return Condition(label=torch.tensor([label]))


def points(count: int, seed: int = 0) -> Tensor:
    """Standard normal points, float64 [count, 2]."""
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
