"""The FID features: the 2015 Inception network with its weights, its resize and its name."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.evaluation.features.inception_network import InceptionNetwork
from carrara.evaluation.features.inception_weights import OFFICIAL, read_weights
from carrara.evaluation.features.preparation import inception_input


class Inception:
    """The FID features: images [N, 1 or 3, H, W] in [-1, 1] -> float32 [N, 2048].

    Attributes:
        name: "inception-2015" with the weights of that day, "inception" with any other.
        checksum: SHA-256 of the weights file.
        preparation: how images were resized and scaled, one of `preparation.INCEPTION`.
    """

    def __init__(
        self,
        network: InceptionNetwork,
        checksum: str,
        official: bool,
        preparation: str = "tensorflow",
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = "inception-2015" if official else "inception"
        self.checksum = checksum
        self.preparation = preparation
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(
        cls,
        path: str | Path,
        checksum: str | None = None,
        preparation: str = "tensorflow",
        device: torch.device | str = "cpu",
    ) -> Inception:
        """The network with the weights of a local file, in pytorch-fid's or in TorchScript form.

        Args:
            checksum: the SHA-256 the file must have. None: that of either published file of the 2015 weights.

        Raises:
            UserError: no such file, another checksum, or keys that are not the network's.
        """
        weights, found = read_weights(path, checksum)
        network = InceptionNetwork()
        network.load_state_dict(weights)
        return cls(network, found, found in OFFICIAL, preparation, device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features of one batch, on the network's device."""
        prepared = inception_input(images.to(self.device), self.preparation)
        features: Tensor = self.network(prepared.contiguous(memory_format=torch.channels_last))
        return features

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """The 1,008 logits [N, 1008] of features [N, 2048], without the bias: what the Inception score takes."""
        return F.linear(features.to(self.device), self.network.fc.weight)
