"""CLIP's objective: which text of the batch belongs to an image, and which image to a text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from carrara.objectives.base import Examples, Terms
from carrara.process.noise import Noise


class ContrastiveObjective:
    """½ (cross-entropy over texts + cross-entropy over images) of the pairs of a batch (Radford et al. 2021, figure 3).

    Equal texts of a batch all count as right: the target is uniform over them.

    Args:
        network: `network(images, condition) -> logits` [B, B].
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @property
    def players(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        """The loss in nats; `top1` is 1 where the nearest text is the image's own."""
        self.players[player]
        logits = self.network(batch.x0, batch.condition).float()  # [B, B]
        same = _same_texts(batch).to(logits)
        target = same / same.sum(1, keepdim=True)
        by_image = F.cross_entropy(logits, target, reduction="none")
        by_text = F.cross_entropy(logits.T, target, reduction="none")
        top1 = same.gather(1, logits.detach().argmax(1, keepdim=True)).squeeze(1)
        return Terms((by_image + by_text) / 2, {"top1": top1})

    def end_step(self) -> None:
        """There is nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to restore."""


def _same_texts(batch: Examples) -> torch.Tensor:
    """bool [B, B]: whether two samples have the same text."""
    condition = batch.condition
    text = condition.vector if condition.tokens is None else condition.tokens
    assert text is not None
    return (text.unsqueeze(1) == text.unsqueeze(0)).all(2)
