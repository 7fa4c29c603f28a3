"""The vector-quantised autoencoder (van den Oord et al. 2017); with an adversarial loss VQGAN (Esser et al. 2021)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from carrara.codecs.learned import LearnedCodec, Reconstruction
from carrara.codecs.quantiser import Codes, Quantiser, QuantiserParams, Usage
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process.noise import Noise


class VQAutoencoder(LearnedCodec):
    """An autoencoder whose latent is, at every position, an entry of a codebook.

    Args:
        params: the shape of encoder and decoder.
        quantiser: the codebook.
    """

    kind = "vq"

    def __init__(self, params: AutoencoderParams, quantiser: QuantiserParams) -> None:
        super().__init__(params)
        self.quantiser = Quantiser(quantiser, params.latent_channels)

    @property
    def code_usage(self) -> Usage:
        return self.quantiser.usage

    def config(self) -> dict[str, Any]:
        return super().config() | {"quantiser": asdict(self.quantiser.params)}

    def encode(self, x: Tensor) -> Codes:
        """Images [B, C, H, W] in [-1, 1] to codes, whose `.indices` are int64 [B, h, w]."""
        return self._codes(self.encoder(x).float())

    def _codes(self, latent: Tensor) -> Codes:
        indices = self.quantiser.indices(latent)
        return Codes(indices, self.quantiser.lookup(indices), self.scaled(latent))

    def codes(self, indices: Tensor) -> Codes:
        """The codes of some indices, int64 [B, h, w].

        Raises:
            UserError: an index that is not of the codebook.
        """
        vectors = self.quantiser.lookup(indices)
        return Codes(indices, vectors, self.scaled(vectors))

    def decode(self, z: Tensor | Codes) -> Tensor:
        """Codes, or scaled latents [B, C', h, w] which are quantised first, to images [B, C, H, W]."""
        codes = z if isinstance(z, Codes) else self._codes(self.unscaled(z))
        return self._decoded(codes.vectors)

    def forward(self, x: Tensor, noise: Noise) -> Reconstruction:
        latent = self.encoder(x).float()
        indices = self.quantiser.indices(latent)
        vectors = self.quantiser.lookup(indices)
        loss, commitment, codebook = self.quantiser.loss(latent, vectors)
        if self.latents_learn:
            self.quantiser.accumulate(latent, indices, noise)
        through = latent + (vectors - latent).detach()  # the decoder's gradient goes straight to the encoder
        scalars = {"commitment": commitment.detach(), "codebook": codebook.detach(), **self._usage_scalars()}
        return self._reconstruct(through, loss, scalars, logged=latent)

    def end_step(self) -> None:
        self.quantiser.end_step()
