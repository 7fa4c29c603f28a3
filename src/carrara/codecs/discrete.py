"""The discrete VAE: every position chooses one of K entries, softly while it learns (Ramesh et al. 2021, §2.1).

Its parent is the concrete distribution (Jang et al. 2017; Maddison et al. 2017): softmax((logits + g)/τ) with Gumbel
noise g is differentiable, and a draw of the categorical where τ goes to 0. VQGAN's "Gumbel" variant is the same model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.codecs.learned import LearnedCodec, Reconstruction, initial_log_scale
from carrara.codecs.quantiser import Codes, Usage, check_indices, nearest, summed
from carrara.networks.autoencoder import AutoencoderParams
from carrara.networks.layers import convolution
from carrara.networks.params import Params
from carrara.process.noise import Noise


@dataclass(frozen=True, kw_only=True)
class DiscreteParams(Params):
    """The choice among K entries, and its annealing.

    Attributes:
        codes: K.
        temperature: τ of the first image seen.
        final_temperature: τ from `anneal` images on, reached along a half cosine (DALL·E ends at 1/16).
        anneal: over how many images τ falls; 0 starts with the final one.
        hard: choose one entry in the forward pass, with the soft choice's gradient (straight-through).
        usage_decay: of the moving mean of how often each code is chosen, over steps.
    """

    section: ClassVar[str] = "codec"

    codes: int = 512
    temperature: float = 1.0
    final_temperature: float = 1 / 16
    anneal: int = 0
    hard: bool = False
    usage_decay: float = 0.99

    def _check(self) -> None:
        self._at_least(2, "codes")
        self._at_least(0, "anneal")
        for name in ("temperature", "final_temperature"):
            self._require(getattr(self, name) > 0, name, f"is {getattr(self, name)}: it must be above 0.")

    def temperature_at(self, seen: int) -> float:
        """τ after `seen` images."""
        if seen >= self.anneal:
            return self.final_temperature
        rest = 0.5 * (1 + math.cos(math.pi * seen / self.anneal))
        return self.final_temperature + (self.temperature - self.final_temperature) * rest


class DiscreteAutoencoder(LearnedCodec):
    """An autoencoder whose latent is one of K entries at every position, chosen by logits.

    Args:
        params: the shape of encoder and decoder.
        choice: the entries.
        learned_scale: whether p(x|z) has a learned scale b, as a KL autoencoder's: it weighs the reconstruction
            against the KL, which at a weight of 1 and b = 1 would leave most entries unused.
    """

    kind = "discrete"

    def __init__(self, params: AutoencoderParams, choice: DiscreteParams, *, learned_scale: bool = False) -> None:
        super().__init__(params)
        self.choice = choice
        self.log_scale = initial_log_scale() if learned_scale else None
        self.logits = convolution(2, params.latent_channels, choice.codes, 1)
        self.codebook = nn.Parameter(torch.randn(choice.codes, params.latent_channels))
        self.usage = Usage(choice.codes, choice.usage_decay)
        self._counts: list[Tensor] = []

    @property
    def code_usage(self) -> Usage:
        return self.usage

    def config(self) -> dict[str, Any]:
        return super().config() | {"choice": asdict(self.choice), "learned_scale": self.log_scale is not None}

    def encode(self, x: Tensor) -> Codes:
        """Images [B, C, H, W] in [-1, 1] to the likeliest codes, whose `.indices` are int64 [B, h, w]."""
        return self._lookup(self.logits(self.encoder(x)).argmax(1))

    def codes(self, indices: Tensor) -> Codes:
        """The codes of some indices, int64 [B, h, w].

        Raises:
            UserError: an index that is not of the codebook.
        """
        check_indices(indices, self.choice.codes)
        return self._lookup(indices)

    def _lookup(self, indices: Tensor) -> Codes:
        vectors = F.embedding(indices, self.codebook).permute(0, 3, 1, 2)
        return Codes(indices, vectors, self.scaled(vectors))

    def decode(self, z: Tensor | Codes) -> Tensor:
        """Codes, or scaled latents [B, C', h, w] which become the nearest entries first, to images [B, C, H, W]."""
        if isinstance(z, Codes):
            return self._decoded(z.vectors)
        flat = self.unscaled(z).float().permute(0, 2, 3, 1)
        indices = nearest(flat.reshape(-1, flat.shape[-1]), self.codebook.float()).reshape(flat.shape[:3])
        return self._decoded(self._lookup(indices).vectors)

    def forward(self, x: Tensor, noise: Noise) -> Reconstruction:
        logits = self.logits(self.encoder(x)).float()
        log_q = logits.log_softmax(1)  # [B, K, h, w]
        cold = self.decoder_only or not self.training  # rows count the images seen in training only
        seen = self.choice.anneal if cold else max(noise.ids or (0,))
        temperature = self.choice.temperature_at(seen)
        uniform = noise.uniform(logits.shape, dtype=torch.float32, device=logits.device)
        # A uniform number may round to 1, whose Gumbel number would be infinite.
        gumbel = -torch.log(-torch.log(uniform.clamp(max=1 - 2**-24)))
        chosen = ((logits + gumbel) / temperature).softmax(1)
        if self.choice.hard:
            one = torch.zeros_like(chosen).scatter_(1, chosen.argmax(1, keepdim=True), 1.0)
            chosen = chosen + (one - chosen).detach()
        latent = torch.einsum("bkhw,kc->bchw", chosen, self.codebook)
        if self.latents_learn:
            self._counts.append(torch.bincount(logits.argmax(1).flatten(), minlength=self.choice.codes))
        # KL(q ‖ uniform) = ln K - H(q), summed over the positions, per dimension of the image.
        kl = (log_q.exp() * (log_q + math.log(self.choice.codes))).flatten(1).sum(1)
        scalars = {"kl": kl.detach(), "temperature": kl.new_tensor(temperature), **self._usage_scalars()}
        return self._reconstruct(latent, kl / x[0].numel(), scalars, self.log_scale)

    def end_step(self) -> None:
        if self._counts:
            self.usage.observe(summed(torch.stack(self._counts).sum(0).float()))
            self._counts = []
