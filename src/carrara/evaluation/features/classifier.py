"""The penultimate layer of a classifier trained here: features that know the user's own images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.evaluation.features.checksum import tensors_checksum
from carrara.networks import EncoderClassifier


class ClassifierFeatures:
    """What the last linear layer of an `EncoderClassifier` is given, for clean images, float32 [N, D].

    Attributes:
        name: "classifier".
        checksum: SHA-256 over its tensors.
        preparation: images enter at their own size in [-1, 1], at the network time given.
    """

    name = "classifier"

    def __init__(self, network: EncoderClassifier, network_time: float = 0.0) -> None:
        self.network = network.eval()
        self.network_time = network_time
        self.preparation = f"own size, [-1, 1], network time {network_time:g}"
        self.checksum = tensors_checksum(network.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features of one batch."""
        return self._run(images)[0]

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """The class it reads in each image, int64 [N]: the classifier as a judge."""
        return self._run(images)[1].argmax(1)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        last = self.network.pool.out
        if not isinstance(last, nn.Linear):
            raise UserError("this classifier does not end in a linear layer, so it has no penultimate features.")
        seen: list[Tensor] = []
        hook = last.register_forward_hook(lambda module, given, out: seen.append(given[0].detach()))
        try:
            device = next(self.network.parameters()).device
            logits = self.network(images.to(device), torch.full((len(images),), self.network_time, device=device))
        finally:
            hook.remove()
        return seen[0].float().flatten(1), logits
