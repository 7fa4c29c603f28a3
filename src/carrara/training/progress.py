"""What a step tells, and what is summed up between two lines of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        scalars: what the objective tells beside the loss, float64 [B] each.
        gradient: the norm before clipping.
        scale_fell: the gradient left fp16's range and the loss scale was halved: no fault of the run.
    """

    per_sample: Tensor
    times: Tensor
    quarter: Tensor
    scalars: dict[str, Tensor]
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

    def record(self, names: Sequence[str], first: int) -> dict[str, Any]:
        """Of a step that was not taken: its samples that are not finite, or all where every one is.

        Args:
            names: of the B samples' images.
            first: the global position of the first sample.
        """
        broken = ~torch.isfinite(self.per_sample)
        rows = (broken if bool(broken.any()) else ~broken).nonzero().flatten()
        return {
            "loss": repr(self.loss),
            "gradient_norm": repr(self.gradient),
            "images": [names[row] for row in rows.tolist()],
            "positions": (first + rows).tolist(),
            "times": [repr(time) for time in self.times[rows].tolist()],
        }


@dataclass
class Tally:
    """A sum over steps, and over the samples of each quarter of the noise levels."""

    total: float = 0.0
    sums: tuple[float, ...] = (0.0,) * 4
    counts: tuple[int, ...] = (0,) * 4

    def add(self, per_sample: Tensor, quarter: Tensor) -> None:
        """Take in one step's samples, float64 [B] and int64 [B]."""
        self.total += float(per_sample.mean())
        sums, counts = by_quarter(per_sample, quarter)
        self.sums = tuple((torch.tensor(self.sums, dtype=torch.float64) + sums).tolist())
        self.counts = tuple((torch.tensor(self.counts) + counts).tolist())

    @property
    def by_quarter(self) -> list[float | None]:
        """The mean of every quarter, None for an empty one."""
        return [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]


@dataclass
class Window:
    """Sums since the last log line; part of the checkpoint, so that a resumed log has the same numbers.

    Attributes:
        steps: that were taken.
        gradients: each player's sum of gradient norms.
        tallies: of each player's loss and scalars, by their names in the log.
        validation: the last figures on held-out data, if any were taken since.
    """

    steps: int = 0
    gradients: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    validation: dict[str, Any] | None = None

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take in one step of all players; the first player's figures have no prefix."""
        self.steps += 1
        for number, (player, outcome) in enumerate(outcomes.items()):
            prefix = f"{player}_" if number else ""
            name = f"{prefix}gradient_norm"
            self.gradients[name] = self.gradients.get(name, 0.0) + outcome.gradient
            for key, per_sample in {"loss": outcome.per_sample, **outcome.scalars}.items():
                self.tallies.setdefault(prefix + key, Tally()).add(per_sample, outcome.quarter)

    def means(self) -> dict[str, Any]:
        """What the log line says; a quarter that no sample fell into is null."""
        tallies = dict(self.tallies)
        loss = tallies.pop("loss")
        entry: dict[str, Any] = {"loss": loss.total / self.steps}
        entry |= {"loss_by_quarter": loss.by_quarter} if any(loss.counts) else {}
        entry |= {name: total / self.steps for name, total in self.gradients.items()}
        if tallies:
            entry["terms"] = {name: tally.total / self.steps for name, tally in tallies.items()}
            quarters = {name: tally.by_quarter for name, tally in tallies.items() if any(tally.counts)}
            entry |= {"terms_by_quarter": quarters} if quarters else {}
        if self.validation is not None:
            entry["validation"] = self.validation
        return entry

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Window:
        """From the plain data that `dataclasses.asdict` made of one."""
        tallies = {name: Tally(**tally) for name, tally in state["tallies"].items()}
        return cls(**{**state, "tallies": tallies})


def by_quarter(per_sample: Tensor, quarter: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (float64) and counts of the samples in each of the four quarters."""
    known = quarter >= 0
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, quarter[known], per_sample[known].double())
    return sums, torch.bincount(quarter[known], minlength=4)
