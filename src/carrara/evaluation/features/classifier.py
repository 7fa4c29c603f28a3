"""The penultimate layer of a classifier trained here: features of the user's own images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.evaluation.features.checksum import tensors_checksum
from carrara.modes import eval_mode
from carrara.networks import EncoderClassifier


class ClassifierFeatures:
    """The input of the last linear layer of an `EncoderClassifier`, for clean images, float32 [N, D].

    Attributes:
        name: "classifier".
        checksum: SHA-256 over its tensors.
        preparation: images enter at their own size in [-1, 1], at the network time given.
    """

    name = "classifier"

    def __init__(self, network: EncoderClassifier, network_time: float = 0.0) -> None:
        self.network = network
        self.network_time = network_time
        self.preparation = f"own size, [-1, 1], network time {network_time:g}"
        self.checksum = tensors_checksum(network.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features of one batch."""
        last = self.network.pool.out
        if not isinstance(last, nn.Linear):
            raise UserError(
                "this classifier does not end in a linear layer, so it has no penultimate features.",
                key="features",
                code="unsupported",
            )
        inputs: list[Tensor] = []
        hook = last.register_forward_hook(lambda module, given, out: inputs.append(given[0].detach()))
        try:
            device = next(self.network.parameters()).device
            with eval_mode(self.network):
                self.network(images.to(device), torch.full((len(images),), self.network_time, device=device))
        finally:
            hook.remove()
        return inputs[0].float().flatten(1)
