"""One optimiser step: micro-batches, precision, the joined gradient, and what is done when it is not finite."""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from carrara.devices import to_device
from carrara.distributed import Processes, gather, gradients_joined, local, whole
from carrara.objectives import Examples, Objective, Terms
from carrara.process import Noise
from carrara.recipe import Training
from carrara.training.phases import Phases
from carrara.training.progress import Outcome
from carrara.training.rates import learning_rate

TRAINING_DRAWS = 2**40
"""Draw numbers of training start here, far from those of sampling, so that one seed serves both."""

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(training: Training, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of the forward pass; group norms, time embeddings and losses stay float32 within it."""
    kind = _TYPES.get(training.precision)
    return torch.autocast(device.type, kind, enabled=kind is not None)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of the generator that network dropout alone draws from: another in every step and on every process."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class LossScale:
    """The factor that keeps fp16's small gradients from vanishing (Micikevicius et al. 2018, §3.2).

    It is halved when the gradient overflows and doubled after `PATIENCE` steps without that, on the device. Own,
    because `torch.amp.GradScaler` looks at one process's part of a sharded gradient only.

    Attributes:
        value: float32 [].
        good_steps: in a row, int64 [].
    """

    PATIENCE = 2000

    def __init__(self, value: float = 2.0**16, good_steps: int = 0, device: torch.device | str = "cpu") -> None:
        self.value, self.good_steps = torch.tensor(value, device=device), torch.tensor(good_steps, device=device)

    def update(self, finite: Tensor, counted: Tensor) -> None:
        """Follow one step.

        Args:
            finite: bool [], whether the gradient was.
            counted: bool [], whether the loss was finite: only then the scale can be at fault.
        """
        good = torch.where(finite, self.good_steps + 1, 0)
        grown = torch.where(good % self.PATIENCE == 0, 2 * self.value, self.value)
        self.value = torch.where(counted, torch.where(finite, grown, self.value / 2), self.value)
        self.good_steps = torch.where(counted, good, self.good_steps)

    def state_dict(self) -> dict[str, Any]:
        """Its numbers, for the checkpoint."""
        return {"value": float(self.value), "good_steps": int(self.good_steps)}


def rows_of(terms: Terms) -> dict[str, Tensor]:
    """The columns of `Outcome.table`, float64 [B] each."""
    loss = terms.per_sample.detach()
    row = {
        "loss": loss,
        "times": torch.full_like(loss, math.nan) if terms.times is None else terms.times,
        "quarter": torch.full_like(loss, -1) if terms.quarter is None else terms.quarter,
        **{f"scalar {key}": value.expand(len(loss)) for key, value in terms.scalars.items()},
    }
    return {key: to_device(value, loss.device, torch.float64) for key, value in row.items()}


class Stepper:
    """Optimiser steps of an objective's players.

    Args:
        objective: what is minimised.
        training: how.
        seed: of every draw.
        processes: who else works on the batch.
        micro_batch: images worked on at once.
        phases: of the loop, which the step enters.
    """

    def __init__(
        self,
        objective: Objective,
        training: Training,
        seed: int,
        processes: Processes,
        micro_batch: int,
        phases: Phases,
    ) -> None:
        self.objective, self.training, self.seed = objective, training, seed
        self.processes, self.micro_batch, self.phases = processes, micro_batch, phases
        self.scale = LossScale(device=processes.device) if training.precision == "fp16" else None
        self.optimisers = {
            name: torch.optim.AdamW(
                player.parameters(),
                lr=training.learning_rate,
                betas=training.betas,
                weight_decay=training.weight_decay,
                fused=True,
            )
            for name, player in objective.players.items()
        }

    @property
    def loss_scale(self) -> dict[str, float]:
        """The loss scale for the log; nothing except with fp16."""
        return {} if self.scale is None else {"loss_scale": float(self.scale.value)}

    @staticmethod
    def draws(seed: int, positions: Tensor) -> Noise:
        """The randomness of the samples at some global positions."""
        return Noise(seed).rows(positions).at(TRAINING_DRAWS)

    def step(self, examples: Examples, positions: Tensor, step: int) -> list[Outcome]:
        """One optimiser step of every player, in the declared order; a player whose loss or gradient is not
        finite is left as it was.

        Args:
            examples: this process's samples.
            positions: their global positions, int64 [B].
            step: optimiser steps done before.
        """
        torch.manual_seed(dropout_seed(self.seed, step, self.processes.rank))
        outcomes = []
        for name, player in self.objective.players.items():
            with self.phases("forward/backward"):
                rows = self._accumulate(name, player, examples, positions)
            with self.phases("optimiser"):
                outcomes.append(self._take(name, player, rows, step))
        self.objective.end_step()
        return outcomes

    def _accumulate(self, name: str, player: nn.Module, examples: Examples, positions: Tensor) -> dict[str, Tensor]:
        """Accumulate the gradients of this process's samples; returns `rows_of` all of them."""
        player.train()
        share = len(positions)
        scale = self.scale.value if self.scale else 1.0
        parts: list[dict[str, Tensor]] = []
        for low in range(0, share, self.micro_batch):
            part = slice(low, min(low + self.micro_batch, share))
            some = Examples(examples.x0[part], examples.condition.rows(part))
            with gradients_joined(player, part.stop == share):
                with autocast(self.training, self.processes.device):
                    terms = self.objective.terms(some, self.draws(self.seed, positions[part]), name)
                (terms.per_sample.sum() * (scale / share)).backward()
            parts.append(rows_of(terms))
        return {key: torch.cat([row[key] for row in parts]) for key in parts[0]}

    def _take(self, name: str, player: nn.Module, rows: dict[str, Tensor], step: int) -> Outcome:
        """Clip the gradient, take the step if all is finite, and drop the gradient."""
        optimiser = self.optimisers[name]
        if self.scale is not None:
            gradients = [local(p.grad) for p in player.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale.value)
        norm = whole(nn.utils.clip_grad_norm_(player.parameters(), self.training.clip))
        outcome = self._outcome(rows, norm)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(self.training, step)
        # Read by the fused kernels, which leave everything as it was where it is 1: no one waits for the device.
        optimiser.found_inf = (~outcome.taken).float()  # type: ignore[attr-defined]
        optimiser.step()
        for other in self.optimisers.values():  # the others were frozen: their gradients are dropped
            other.zero_grad(set_to_none=True)
        return outcome

    def _outcome(self, rows: dict[str, Tensor], norm: Tensor) -> Outcome:
        table = gather(torch.stack(list(rows.values()), dim=1))
        counted, finite = torch.isfinite(table[:, 0]).all(), torch.isfinite(norm)
        if self.scale is None:
            return Outcome(table, tuple(rows), norm, counted & finite, torch.zeros_like(finite))
        fell = counted & ~finite & (self.scale.value > 1)
        self.scale.update(finite, counted)
        return Outcome(table, tuple(rows), norm, counted & finite, fell, self.scale.value)
