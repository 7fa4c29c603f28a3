"""What a step yields, and what is summed up between two lines of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """What a step yields.

    Attributes:
        step, total: optimiser steps done, of the whole run.
        device_loss: of this step, a tensor [] where the network computes.
        images_per_s: since this process started.
        seconds_left: at that speed.
        notice: a sentence for the user, or None.
    """

    step: int
    total: int
    device_loss: Tensor
    images_per_s: float
    seconds_left: float
    notice: str | None = None

    @property
    def loss(self) -> float:
        """The loss of this step. Reading it waits until the device has computed the step."""
        return float(self.device_loss)


@dataclass(frozen=True)
class Outcome:
    """What one optimiser step of one player gave, the same on every process; on its device until `cpu` is called.

    Attributes:
        table: float64 [B, columns], the samples in the order of their global positions.
        columns: "loss"; "times", the noise levels that were visited, NaN where the objective has none; "quarter", see
            `Terms.quarter`, -1 where there are no levels; and "scalar NAME" for each of the objective's.
        gradient: the norm before clipping, [].
        taken: bool [], whether the optimiser took the step: loss and gradient were finite.
        scale_fell: bool [], the gradient left fp16's range and the loss scale was halved: no fault of the run.
        loss_scale: of fp16 after the step, [].
    """

    table: Tensor
    columns: tuple[str, ...]
    gradient: Tensor
    taken: Tensor
    scale_fell: Tensor
    loss_scale: Tensor | None = None

    def cpu(self) -> Outcome:
        """The same on the CPU; waits for the device."""
        return replace(
            self,
            table=self.table.cpu(),
            gradient=self.gradient.cpu(),
            taken=self.taken.cpu(),
            scale_fell=self.scale_fell.cpu(),
        )

    @property
    def per_sample(self) -> Tensor:
        """The losses, float64 [B]."""
        return self.table[:, 0]

    @property
    def times(self) -> Tensor:
        """float64 [B]."""
        return self.table[:, 1]

    @property
    def quarter(self) -> Tensor:
        """int64 [B]."""
        return self.table[:, 2].long()

    @property
    def scalars(self) -> dict[str, Tensor]:
        """What the objective reports in addition to the loss, float64 [B] each."""
        pairs = zip(self.columns[3:], self.table.unbind(1)[3:], strict=True)
        return {column.removeprefix("scalar "): values for column, values in pairs}

    @property
    def loss(self) -> Tensor:
        """The mean over the batch, []."""
        return self.per_sample.mean()

    def record(self, names: Sequence[str], first: int) -> dict[str, Any]:
        """Of a step that was not taken: its samples that are not finite, or all where every one is.

        Args:
            names: of the B samples' images.
            first: the global position of the first sample.
        """
        broken = ~torch.isfinite(self.per_sample)
        rows = (broken if bool(broken.any()) else ~broken).nonzero().flatten()
        return {
            "loss": repr(float(self.loss)),
            "gradient_norm": repr(float(self.gradient)),
            "images": [names[row] for row in rows.tolist()],
            "positions": (first + rows).tolist(),
            "times": [repr(time) for time in self.times[rows].tolist()],
        } | ({} if self.loss_scale is None else {"loss_scale": float(self.loss_scale)})


@dataclass
class Tally:
    """A sum over steps, and over the samples of each quarter of the noise levels."""

    total: float = 0.0
    sums: tuple[float, ...] = (0.0,) * 4
    counts: tuple[int, ...] = (0,) * 4

    def add(self, per_sample: Tensor, quarter: Tensor) -> None:
        """Add one step's samples, float64 [B] and int64 [B]."""
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
        validation: the last metrics on held-out data, if any were computed since.
    """

    steps: int = 0
    gradients: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    validation: dict[str, Any] | None = None

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        """Add one step of all players, on the CPU; the first player's names have no prefix."""
        self.steps += 1
        for number, (player, outcome) in enumerate(outcomes.items()):
            prefix = f"{player}_" if number else ""
            name = f"{prefix}gradient_norm"
            self.gradients[name] = self.gradients.get(name, 0.0) + float(outcome.gradient)
            for key, per_sample in {"loss": outcome.per_sample, **outcome.scalars}.items():
                self.tallies.setdefault(prefix + key, Tally()).add(per_sample, outcome.quarter)

    def means(self) -> dict[str, Any]:
        """The entry of the log; a quarter that no sample fell into is null."""
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
