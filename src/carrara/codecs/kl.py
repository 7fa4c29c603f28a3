"""The variational autoencoder, of which latent diffusion's KL autoencoder is the lightly regularised case.

-ELBO = -E ln p(x|z) + KL(q(z|x) ‖ N(0, I)) (Kingma & Welling 2014, eq. 3). The two differ in the weight of the second
term alone, `carrara.objectives.CodecLoss.latent`: 1 makes a VAE, 1e-6 Stable Diffusion's first stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carrara.codecs.learned import LearnedCodec, Reconstruction, channelwise, initial_log_scale
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process.noise import Noise
from carrara.process.transitions import Gaussian

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""What the encoder's log-variance is clamped to, as in latent diffusion."""


@dataclass(frozen=True)
class DiagonalGaussian(Gaussian):
    """q(z|x) = N(mean, e^{log_variance}), every dimension on its own.

    Attributes:
        mean: [B, C', h, w].
        log_variance: [B, C', h, w].
    """

    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> DiagonalGaussian:
        """From an encoder's output [B, 2C', h, w]: the means, then the log-variances, which are clamped."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def mode(self) -> Tensor:
        """The mean, [B, C', h, w]: for inversion and evaluation."""
        return self.mean

    def sample(self, noise: Noise | Tensor) -> Tensor:
        """mean + standard deviation · noise, [B, C', h, w]: for training; the noise by address, or as numbers."""
        return self.draw(noise if isinstance(noise, Tensor) else noise.like(self.mean))

    def scaled(self, shift: Tensor, scale: Tensor) -> DiagonalGaussian:
        """The Gaussian of (z - shift)·scale, each of which is [C']."""
        mean = (self.mean - channelwise(shift)) * channelwise(scale)
        return DiagonalGaussian(mean, self.log_variance + 2 * channelwise(scale).log())

    def kl_to_standard(self) -> Tensor:
        """KL(q ‖ N(0, I)) in nats, summed over the latent's dimensions, [B]."""
        return self.kl(Gaussian(torch.zeros_like(self.mean), 0.0)).flatten(1).sum(1)


class KLAutoencoder(LearnedCodec):
    """An autoencoder whose encoder predicts a Gaussian (Kingma & Welling 2014; Rombach et al. 2022, §3.1).

    Args:
        params: the shape of encoder and decoder.
        learned_scale: whether p(x|z) has a learned scale b, one number: Laplace of scale b under an L1
            reconstruction term, Gaussian of standard deviation b under L2. It starts at b = 0.1.
    """

    kind = "kl"

    def __init__(self, params: AutoencoderParams, *, learned_scale: bool = False) -> None:
        super().__init__(params, moments=2)
        self.log_scale = initial_log_scale() if learned_scale else None

    def config(self) -> dict[str, Any]:
        return super().config() | {"learned_scale": self.log_scale is not None}

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) before the latent scale, float32."""
        return DiagonalGaussian.of(self.encoder(x).float())

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) of images [B, C, H, W] in [-1, 1], scaled: `.mean` and `.log_variance` [B, C', h, w]."""
        return self.posterior(x).scaled(self.latent_shift, self.latent_scale)

    def forward(self, x: Tensor, noise: Noise) -> Reconstruction:
        q = self.posterior(x)
        kl = q.kl_to_standard()
        scalars = {"kl": kl.detach()}
        return self._reconstruct(q.sample(noise), kl / x[0].numel(), scalars, self.log_scale, logged=q.mean)
