"""The loss on held-out images: always the same ones, at the same noise levels, with the same noise."""

from __future__ import annotations

from typing import Any

import torch

from carrara.codecs import Codec
from carrara.conditioning import Labels
from carrara.data import Batches
from carrara.distributed import gather
from carrara.objectives import DiffusionObjective
from carrara.process import Noise
from carrara.training.assembly import examples_of
from carrara.training.progress import by_quarter, quarter_means
from carrara.training.step import TRAINING_DRAWS

VALIDATION_DRAWS = 2 * TRAINING_DRAWS
"""Draw numbers of validation start here."""


@torch.no_grad()
def validate(
    objective: DiffusionObjective,
    held_out: Batches,
    images: int,
    codec: Codec,
    labels: Labels | None,
    device: torch.device,
) -> dict[str, Any]:
    """The mean loss over about `images` held-out images, whole batches of all processes.

    Args:
        objective: around the network that is judged, which this process holds whole.
        held_out: this process's part of the data.
        images: how many.
        codec, labels: what the network works in and is told.

    Returns:
        `loss`, `loss_by_quarter`, and of how many `images`.
    """
    rows = []
    for number in range(max(1, images // held_out.batch_size)):
        batch = held_out.at(number)
        draw = Noise(held_out.seed).rows(batch.positions).at(VALIDATION_DRAWS)
        terms = objective.terms(examples_of(batch, codec, labels, draw, device), draw, "network")
        assert terms.quarter is not None
        pair = terms.per_sample.double(), terms.quarter.to(terms.per_sample.device, torch.float64)
        rows.append(gather(torch.stack(pair, dim=1)).cpu())
    loss, quarter = torch.cat(rows).unbind(1)
    sums, counts = by_quarter(loss, quarter.long())
    by_quarters = quarter_means(tuple(sums.tolist()), tuple(counts.tolist()))
    return {"loss": float(loss.mean()), "loss_by_quarter": by_quarters, "images": len(loss)}
