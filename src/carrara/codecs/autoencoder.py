"""The plain autoencoder: one latent for an image, and nothing that shapes the latents."""

from __future__ import annotations

from torch import Tensor

from carrara.codecs.base import Exact
from carrara.codecs.learned import LearnedCodec, Reconstruction
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process.noise import Noise


class Autoencoder(LearnedCodec):
    """Encoder and decoder, trained for reconstruction alone (Hinton & Salakhutdinov 2006).

    Its latents may have any scale, so measure the latent scale before a diffusion model learns them.
    """

    kind = "autoencoder"

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__(params)

    def encode(self, x: Tensor) -> Exact:
        """Images [B, C, H, W] in [-1, 1] to their one latent, scaled."""
        return Exact(self.scaled(self.encoder(x)))

    def forward(self, x: Tensor, noise: Noise) -> Reconstruction:
        return self._reconstruct(self.encoder(x), x.new_zeros(len(x)), {})
