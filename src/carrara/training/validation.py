"""The loss on held-out images: always the same ones, at the same noise levels, with the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from carrara.data import Batch, Batches
from carrara.distributed import gather
from carrara.objectives import Examples, Objective
from carrara.process import Noise
from carrara.training.progress import Tally
from carrara.training.step import TRAINING_DRAWS, rows_of

VALIDATION_DRAWS = 2 * TRAINING_DRAWS
"""Draw numbers of validation start here."""


@torch.no_grad()
def validate(
    objective: Objective, examples: Callable[[Batch, Noise], Examples], held_out: Batches, images: int
) -> dict[str, Any]:
    """The first player's mean loss over about `images` held-out images, whole batches of all processes.

    Args:
        objective: around modules that this process holds whole.
        examples: what the objective takes of a batch.
        held_out: this process's part of the data.
        images: how many.

    Returns:
        Of the loss and of every scalar that the objective returns for each sample: its mean by its name, and
        `NAME_by_quarter` of the noise levels where there are any; and of how many `images`.
    """
    player, module = next(iter(objective.players.items()))
    training = module.training
    module.eval()
    parts: list[dict[str, torch.Tensor]] = []
    for number in range(max(1, images // held_out.batch_size)):
        batch = held_out.at(number)
        draw = Noise(held_out.seed).rows(batch.positions).at(VALIDATION_DRAWS)
        rows = rows_of(objective.terms(examples(batch, draw), draw, player))
        table = gather(torch.stack(list(rows.values()), dim=1)).cpu()
        parts.append(dict(zip(rows, table.unbind(1), strict=True)))
    module.train(training)
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    quarter, _ = columns.pop("quarter").long(), columns.pop("times")
    metrics: dict[str, Any] = {}
    for name, values in columns.items():
        tally = Tally()
        tally.add(values, quarter)
        name = name.removeprefix("scalar ")
        metrics[name] = tally.total
        metrics |= {f"{name}_by_quarter": tally.by_quarter} if any(tally.counts) else {}
    return {**metrics, "images": len(quarter)}
