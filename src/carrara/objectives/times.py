"""The distribution of training times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process import grids
from carrara.process.grids import Grid
from carrara.process.schedules import Schedule


class TimeSampler(ABC):
    """Draws the time of every sample and the importance weight that keeps the expectation unbiased."""

    @abstractmethod
    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            schedule: the noise levels.
            uniform: float64 [B] in (0, 1), addressed by position.

        Returns:
            times, float64 [B], in schedule units; weights, float64 [B].
        """

    def observe(self, times: Tensor, losses: Tensor, positions: Sequence[int]) -> None:  # noqa: B027 (most do nothing)
        """Collect the losses of a batch, or of a part of one, for `end_step`.

        Args:
            times: the times that `draw` returned, [B].
            losses: per sample, without the importance weights, detached, [B].
            positions: the samples' global positions in the run.
        """

    def end_step(self) -> None:  # noqa: B027
        """Learn from the losses collected since the last call: once a step, so that micro-batches change nothing.
        Every process must call it."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as plain data for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise UserError(
                f"{type(self).__name__} keep no state, but the checkpoint has {sorted(state)}: it is another run's.",
                key="objective.times",
                code="mismatch",
            )


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """t uniform over 1..T of a table (Ho et al. 2020, algorithm 1), over first_time..final_time otherwise.

    Attributes:
        grid: trains on the starting times of these pairs instead, as a respaced process is trained.
    """

    grid: Grid | None = None

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid is not None:
            times = self.grid.times[(uniform * len(self.grid)).long()]
        elif schedule.discrete:
            times = (uniform * schedule.final_time).floor() + 1
        else:
            times = schedule.first_time + uniform * (schedule.final_time - schedule.first_time)
        return times, torch.ones_like(times)


@dataclass(frozen=True)
class CleanTimes(TimeSampler):
    """t = 0 alone: for a classifier that evaluates clean images."""

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(uniform), torch.ones_like(uniform)


def _within(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """Times moved into the schedule's range, to whole ones on a table, each with weight 1."""
    times = (times.round() if schedule.discrete else times).clamp(schedule.first_time, schedule.final_time)
    return times, torch.ones_like(times)


@dataclass(frozen=True)
class LogitNormalTimes(TimeSampler):
    """ln(u/(1-u)) ~ N(mean, std²) for u = t/final_time: more of the middle (Esser et al. 2024, eq. 19).

    The distribution is itself the weighting: no importance weights undo it.
    """

    mean: float = 0.0
    std: float = 1.0

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        fraction = torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform))
        return _within(schedule, fraction * schedule.final_time)


@dataclass(frozen=True)
class LogNormalTimes(TimeSampler):
    """ln σ ~ N(mean, std²) for the noise-to-signal ratio σ = s/a (Karras et al. 2022, table 1), on any schedule.

    The distribution is itself the weighting: no importance weights undo it.
    """

    mean: float = -1.2
    std: float = 1.2

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        log_sigma = self.mean + self.std * torch.special.ndtri(uniform)
        return _within(schedule, schedule.time_at(-2 * log_sigma))


class LossAwareTimes(TimeSampler):
    """Visits the levels with large losses more often (Nichol & Dhariwal 2021, eq. 18).

    p_t = (1 - ε)·w_t/Σw + ε/T with w_t = √E[L_t²] over the last losses of t, uniform until every level has
    enough of them; the importance weights 1/(p_t T) keep the expectation.

    Args:
        schedule: the noise levels.
        grid: the process that is trained, by default the whole table.
        history: how many of its last losses each level keeps.
        uniform: ε, the fraction that is uniform.
        gather: joins the rows of all processes (`carrara.distributed.gather`), so that all know the same; by
            default there is one process.
    """

    def __init__(
        self,
        schedule: Schedule,
        grid: Grid | None = None,
        history: int = 10,
        uniform: float = 0.001,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if history < 1 or not 0 < uniform <= 1:
            raise UserError(
                "loss-aware times need a history of at least 1 and a uniform fraction above 0, at most 1.",
                key="objective.times",
            )
        if grid is None:
            if not schedule.discrete:
                raise UserError(
                    "loss-aware times keep losses by level, a continuous schedule has none: give a grid.",
                    key="grid",
                    code="missing",
                )
            grid = grids.trailing(schedule, int(schedule.final_time))
        self.levels = grid.times[:-1].flip(0)
        self.uniform, self._gather = uniform, gather or (lambda rows: rows)
        self.history = torch.zeros(len(self.levels), history, dtype=torch.float64)
        self.counts = torch.zeros(len(self.levels), dtype=torch.int64)
        self._collected: list[Tensor] = []

    @property
    def warm(self) -> bool:
        """Whether every level has its history."""
        return bool((self.counts == self.history.shape[1]).all())

    def probabilities(self) -> Tensor:
        """p_t of every level, float64 [T], summing to one."""
        if not self.warm:
            return torch.full_like(self.levels, 1 / len(self.levels))
        weight = self.history.square().mean(1).sqrt()
        total = weight.sum()
        if total == 0:
            return torch.full_like(self.levels, 1 / len(self.levels))
        return (1 - self.uniform) * weight / total + self.uniform / len(self.levels)

    def draw(self, schedule: Schedule, uniform: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.probabilities()
        reached = probabilities.cumsum(0)
        index = torch.searchsorted(reached, uniform * reached[-1], right=True).clamp(max=len(self.levels) - 1)
        return self.levels[index], 1 / (probabilities[index] * len(self.levels))

    def observe(self, times: Tensor, losses: Tensor, positions: Sequence[int]) -> None:
        index = torch.searchsorted(self.levels, times.cpu().double())
        local = torch.tensor(list(positions), dtype=torch.float64), index.double(), losses.detach().cpu().double()
        self._collected.append(torch.stack(local, dim=1).to(losses.device))

    def end_step(self) -> None:
        """Add the collected losses of all processes to the history, in the order of their global positions.

        A loss that is not finite is left out: its level would be drawn for ever.
        """
        if not self._collected:
            return
        rows = self._gather(torch.cat(self._collected)).cpu()
        self._collected.clear()
        rows = rows[rows[:, 0].argsort(stable=True)]
        for level, loss in zip(rows[:, 1].long().tolist(), rows[:, 2].tolist(), strict=True):
            if loss - loss != 0:  # NaN or infinity
                continue
            self.history[level] = self.history[level].roll(-1)
            self.history[level, -1] = loss
            self.counts[level] = min(int(self.counts[level]) + 1, self.history.shape[1])

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: a history of another size.
        """
        if state.keys() != {"history", "counts"} or state["history"].shape != self.history.shape:
            raise UserError(
                "the checkpoint's loss history does not fit: it is of other levels.",
                key="objective.times",
                code="mismatch",
            )
        self.history, self.counts = state["history"].clone(), state["counts"].clone()
