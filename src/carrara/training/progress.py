"""What a step tells, and what is summed up between two lines of the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """What a step yields.

    Attributes:
        step, total: optimiser steps done, of the whole run.
        loss: of this step.
        images_per_s: since this process started.
        seconds_left: at that speed.
        notice: a sentence for the user, or None.
    """

    step: int
    total: int
    loss: float
    images_per_s: float
    seconds_left: float
    notice: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What one optimiser step of one player gave, the same on every process.

    Attributes:
        per_sample: float64 [B], in the order of the global positions.
        times: float64 [B], the noise levels that were visited; NaN where the objective has none.
        quarter: int64 [B], see `Terms.quarter`; -1 where there are no levels.
        scalars: the means of what the objective tells beside the loss.
        gradient: the norm before clipping.
        scale_fell: the gradient left fp16's range and the loss scale was halved: no fault of the run.
    """

    per_sample: Tensor
    times: Tensor
    quarter: Tensor
    scalars: dict[str, float]
    gradient: float
    scale_fell: bool = False

    @property
    def loss(self) -> float:
        """The mean over the batch."""
        return float(self.per_sample.mean())

    @property
    def finite(self) -> bool:
        """Whether the optimiser could take the step."""
        return bool(torch.isfinite(self.per_sample).all()) and abs(self.gradient) < float("inf")


@dataclass
class Window:
    """Sums since the last log line; part of the checkpoint, so that a resumed log has the same numbers.

    Attributes:
        validation: the last figures on held-out data, if any were taken since.
    """

    steps: int = 0
    loss: float = 0.0
    gradient: float = 0.0
    scalars: dict[str, float] = field(default_factory=dict)
    quarter_sums: tuple[float, ...] = (0.0,) * 4
    quarter_counts: tuple[int, ...] = (0,) * 4
    validation: dict[str, Any] | None = None

    def add(self, outcome: Outcome) -> None:
        """Take in one step."""
        self.steps += 1
        self.loss += outcome.loss
        self.gradient += outcome.gradient
        for name, value in outcome.scalars.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value
        sums, counts = by_quarter(outcome.per_sample, outcome.quarter)
        self.quarter_sums = tuple((torch.tensor(self.quarter_sums, dtype=torch.float64) + sums).tolist())
        self.quarter_counts = tuple((torch.tensor(self.quarter_counts) + counts).tolist())

    def means(self) -> dict[str, Any]:
        """What the log line says; a quarter that no sample fell into is null."""
        entry: dict[str, Any] = {
            "loss": self.loss / self.steps,
            "loss_by_quarter": quarter_means(self.quarter_sums, self.quarter_counts),
            "gradient_norm": self.gradient / self.steps,
        }
        if self.scalars:
            entry["terms"] = {name: value / self.steps for name, value in self.scalars.items()}
        if self.validation is not None:
            entry["validation"] = self.validation
        return entry


def by_quarter(per_sample: Tensor, quarter: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (float64) and counts of the samples in each of the four quarters."""
    known = quarter >= 0
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, quarter[known], per_sample[known].double())
    return sums, torch.bincount(quarter[known], minlength=4)


def quarter_means(sums: tuple[float, ...], counts: tuple[int, ...]) -> list[float | None]:
    """The mean of every quarter, None for an empty one."""
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
