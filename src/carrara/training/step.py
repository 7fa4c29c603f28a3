"""One optimiser step: micro-batches, precision, the joined gradient, and what is done when it is not finite."""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """Of the generator that network dropout alone draws from: anew in every step, apart on every process."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@dataclass
class LossScale:
    """The factor that keeps fp16's small gradients from vanishing (Micikevicius et al. 2018, §3.2).

    It is halved when the gradient overflows and doubled after `PATIENCE` steps without that. Own, because
    `torch.amp.GradScaler` looks at one process's share of a sharded gradient only.
    """

    value: float = 2.0**16
    good_steps: int = 0

    PATIENCE = 2000

    def update(self, finite: bool) -> None:
        """Take in whether the gradient was finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % self.PATIENCE == 0:
            self.value *= 2


def rows_of(terms: Terms) -> dict[str, Tensor]:
    """What is known of each sample, float64 [B] each: `loss`, `times` and `quarter` (NaN and -1 where there are none),
    and `scalar NAME` for what the objective tells beside them."""
    loss = terms.per_sample.detach()
    row = {
        "loss": loss,
        "times": torch.full_like(loss, math.nan) if terms.times is None else terms.times,
        "quarter": torch.full_like(loss, -1) if terms.quarter is None else terms.quarter,
        **{f"scalar {key}": value.expand(len(loss)) for key, value in terms.scalars.items()},
    }
    return {key: value.to(loss.device, torch.float64) for key, value in row.items()}


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
        self.scale = LossScale() if training.precision == "fp16" else None
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
        return {} if self.scale is None else {"loss_scale": self.scale.value}

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
        """Add up the gradients of this process's samples; what is known of each sample, [B] each."""
        player.train()
        share = len(positions)
        scale = self.scale.value if self.scale else 1.0
        told: list[dict[str, Tensor]] = []
        for low in range(0, share, self.micro_batch):
            part = slice(low, min(low + self.micro_batch, share))
            some = Examples(examples.x0[part], examples.condition.rows(part))
            with gradients_joined(player, part.stop == share):
                with autocast(self.training, self.processes.device):
                    terms = self.objective.terms(some, self.draws(self.seed, positions[part]), name)
                (terms.per_sample.sum() * (scale / share)).backward()
            told.append(rows_of(terms))
        return {key: torch.cat([row[key] for row in told]) for key in told[0]}

    def _take(self, name: str, player: nn.Module, rows: dict[str, Tensor], step: int) -> Outcome:
        """Clip the gradient, take the step if all is finite, and forget the gradient."""
        optimiser = self.optimisers[name]
        if self.scale is not None:
            gradients = [local(p.grad) for p in player.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale.value)
        norm = float(whole(nn.utils.clip_grad_norm_(player.parameters(), self.training.clip)))
        outcome = self._outcome(rows, norm)
        if outcome.finite:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.training, step)
            optimiser.step()
        for other in self.optimisers.values():  # the others were frozen: what the loss says of them is dropped
            other.zero_grad(set_to_none=True)
        return outcome

    def _outcome(self, rows: dict[str, Tensor], norm: float) -> Outcome:
        table = gather(torch.stack(list(rows.values()), dim=1)).cpu()
        all_rows = dict(zip(rows, table.unbind(1), strict=True))
        loss = all_rows["loss"]
        scale_fell = False
        if self.scale is not None and bool(torch.isfinite(loss).all()):
            scale_fell = not math.isfinite(norm) and self.scale.value > 1
            self.scale.update(math.isfinite(norm))
        prefix = "scalar "
        scalars = {k.removeprefix(prefix): v for k, v in all_rows.items() if k.startswith(prefix)}
        return Outcome(loss, all_rows["times"], all_rows["quarter"].long(), scalars, norm, scale_fell)
