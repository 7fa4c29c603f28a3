"""Training a codec: reconstruction, what the latent costs, how it looks, and a patch discriminator.

One objective serves the whole ladder (autoencoder, VAE, VQ-VAE, VQGAN, latent diffusion's first stages, discrete and
hierarchical VAE): its terms are switched by weights, see `LOSSES`. All terms are means over an image's dimensions, so
that "a KL weight of 1e-6" means what it does in latent diffusion, where reconstruction and KL are both sums
(Rombach et al. 2022, §G; docs/math.md §8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from carrara.codecs.learned import LearnedCodec, Reconstruction
from carrara.codecs.perceptual import Perceptual
from carrara.distributed import any_of
from carrara.errors import UserError
from carrara.networks.params import Params
from carrara.objectives.adversarial import GAN, adaptive_weight, discriminator_loss, generator_loss
from carrara.objectives.base import Examples, Terms
from carrara.objectives.image_loss import ImageLoss
from carrara.process.noise import Noise
from carrara.similarity import ssim

Distance = Literal["l1", "l2"]

CODEC, DISCRIMINATOR = "codec", "discriminator"
"""The players, in stepping order."""
_COLLAPSED = 2.0
"""A codebook whose perplexity is below this carries hardly any information."""
_PATIENCE = 500
"""Steps of training before a collapsed codebook stops the run."""
_CHANNELS = 16
"""Latents of more channels are logged as a whole."""


@dataclass(frozen=True, kw_only=True)
class CodecLoss(Params):
    """Which terms a codec is trained on.

    Attributes:
        distance: reconstruction by |x - x̂| or (x - x̂)². With a codec's learned scale b these are the negative
            log-likelihoods of a Laplace and of a Gaussian distribution, up to constants.
        latent: weight of what the latent costs: the KL per image dimension (1 makes a VAE, 1e-6 a first stage of
            latent diffusion), or the quantiser's loss.
        perceptual: weight of the perceptual distance, in addition to the reconstruction; 0 leaves it out.
        adversarial: weight of the discriminator's loss; 0 leaves the discriminator out.
        gan: the discriminator's loss: "hinge", or "logarithmic": it maximises ln D(x) + ln(1 - D(x̂)).
        adaptive: scale the discriminator's gradient to the reconstruction's, at the decoder's last layer.
        start: images seen before the discriminator starts to learn and to count. It starts untrained: expect a dip.
        ramp: over how many images its weight then rises to its full value; 0 at once.
    """

    section: ClassVar[str] = "loss"

    distance: Distance = "l1"
    latent: float = 1.0
    perceptual: float = 0.0
    adversarial: float = 0.0
    gan: GAN = "hinge"
    adaptive: bool = True
    start: int = 0
    ramp: int = 0

    def _check(self) -> None:
        self._one_of("distance", get_args(Distance))
        self._one_of("gan", get_args(GAN))
        self._at_least(0, "latent", "perceptual", "adversarial", "start", "ramp")


LOSSES: dict[str, CodecLoss] = {
    "autoencoder": CodecLoss(distance="l2", latent=0.0),
    "vae": CodecLoss(distance="l2"),
    "kl": CodecLoss(latent=1e-6, perceptual=1.0, adversarial=0.5),
    "vq": CodecLoss(distance="l2"),
    "vqgan": CodecLoss(perceptual=1.0, adversarial=0.8),
    "dvae": CodecLoss(distance="l1"),
    "gumbel": CodecLoss(perceptual=1.0, adversarial=0.8, latent=0.1),
    "hierarchical": CodecLoss(distance="l2"),
}
"""The usual loss of every rung of the ladder; the weights of `kl` and `vqgan` are their papers' own, and so is that of
`gumbel`, a discrete VAE without a learned scale, as taming-transformers trains it: 5e-4 for each nat of a position, of
which there is one to 192 dimensions (RGB, a reduction of 8)."""


class CodecObjective:
    """The losses of codec and discriminator, which step in this order on the same batch.

    The discriminator gets the reconstructions of the codec's own turn. Progress is counted in images: a sample's global
    position, which its randomness is addressed by, is the number of images seen before it.

    Args:
        codec: learns; may be wrapped for several processes.
        loss: the terms.
        perceptual: the distance of that term; needed where its weight is above 0.
        discriminator: logits for patches, [B, 1, h, w]; needed where the adversarial weight is above 0.

    Raises:
        UserError: a term without its network.
    """

    def __init__(
        self,
        codec: nn.Module,
        loss: CodecLoss,
        perceptual: Perceptual | None = None,
        discriminator: nn.Module | None = None,
    ) -> None:
        if loss.perceptual and perceptual is None:
            raise UserError(
                "loss.perceptual is above 0, but there is no perceptual network: name its weights file.",
                key="loss.perceptual",
                code="missing",
            )
        if loss.adversarial and discriminator is None:
            raise UserError(
                "loss.adversarial is above 0, but there is no discriminator.", key="loss.adversarial", code="missing"
            )
        self.codec, self.loss, self.perceptual = codec, loss, perceptual
        self.discriminator = discriminator if loss.adversarial else None
        self._made: dict[tuple[int, ...] | None, Tensor] = {}

    @property
    def players(self) -> dict[str, nn.Module]:
        if self.discriminator is None:
            return {CODEC: self.codec}
        return {CODEC: self.codec, DISCRIMINATOR: self.discriminator}

    def notices(self, images: int) -> list[str]:
        """Warnings for the user before a run over so many images."""
        if self.discriminator is None or self.loss.start < images:
            return []
        return [
            f"the discriminator starts after {self.loss.start:,} images, but the run ends after {images:,}: it will "
            "never take part."
        ]

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        """A player's loss on clean images [B, C, H, W] in [-1, 1].

        Raises:
            UserError: the adaptive weight is not a number, or the codebook has collapsed.
        """
        self.players[player]
        seen = torch.tensor(draw.ids or (0,) * len(batch.x0), dtype=torch.float64, device=batch.x0.device)
        return self._codec(batch.x0, draw, seen) if player == CODEC else self._discriminator(batch.x0, draw, seen)

    def end_step(self) -> None:
        codec = _bare(self.codec)
        if isinstance(codec, LearnedCodec):
            codec.end_step()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    # ---- the codec's turn -----------------------------------------------------------------------------------

    def _codec(self, x: Tensor, draw: Noise, seen: Tensor) -> Terms:
        """L = L_rec + λ·ramp·L_GAN + w·L_latent (Esser et al. 2021, eq. 4-7; Rombach et al. 2022, eq. 25).

        L_rec includes the perceptual term, λ the weight of the adversarial one; ramp is 0 before the discriminator's
        start and rises to 1.
        """
        made: Reconstruction = self.codec(x, draw)
        image = made.image.detach().float().requires_grad_(torch.is_grad_enabled())
        scalars: dict[str, Tensor] = {}
        l_rec = self._reconstruction(x, image, made.log_scale, scalars)
        if self.discriminator is None:
            loss = l_rec
        else:
            ramp = self.fraction(seen)
            l_gan, weight = self._adversarial(image, ramp, made, l_rec, seen)
            scalars |= {"adversarial": l_gan.value, "adaptive weight": weight}
            loss = l_rec + l_gan * (weight * ramp)
            if torch.is_grad_enabled() and bool((seen >= self.loss.start).any()):
                self._made[draw.ids] = made.image.detach()
        per_sample = loss.at(made.image) + self.loss.latent * made.penalty
        scalars |= made.scalars | {"latent cost": made.penalty.detach(), **_moments(made.latent)}
        self._check_codebook()
        return Terms(per_sample, scalars)

    def _reconstruction(
        self, x: Tensor, image: Tensor, log_scale: Tensor | None, scalars: dict[str, Tensor]
    ) -> ImageLoss:
        """L_rec = e, the error of the image and the perceptual distance, or where the codec learns a scale b its
        negative log-likelihood, e/b + ln b (Laplace, "l1") or e/(2b²) + ln b (Gaussian, "l2")."""
        error = ImageLoss.of(self._error(x, image, scalars), image)
        if log_scale is None:
            return error
        scalars["learned scale"] = log_scale.detach().exp()
        squared = self.loss.distance == "l2"
        return error * (0.5 * torch.exp(-2 * log_scale) if squared else torch.exp(-log_scale)) + log_scale

    def _error(self, x: Tensor, image: Tensor, scalars: dict[str, Tensor]) -> Tensor:
        """|x - x̂| or (x - x̂)² as means, and the perceptual distance, [B]; adds what is logged."""
        difference = image - x
        squares = difference.square().flatten(1).mean(1)
        distance = squares if self.loss.distance == "l2" else difference.abs().flatten(1).mean(1)
        scalars["reconstruction"] = distance.detach()
        scalars["psnr"] = 10 * torch.log10(4 / squares.detach().clamp(min=1e-12))  # peak 2 on [-1, 1], for each image
        # Of all held-out images, but of one of a training pass: it costs more than all else here.
        rows = slice(0, 1 if torch.is_grad_enabled() else None)
        with torch.no_grad():
            scalars["ssim"] = ssim(image[rows], x[rows])
        if self.loss.perceptual and self.perceptual is not None:
            perceptual = self.perceptual(image, x)
            scalars["perceptual"] = perceptual.detach()
            distance = distance + self.loss.perceptual * perceptual
        return distance

    def _adversarial(
        self, image: Tensor, ramp: Tensor, made: Reconstruction, l_rec: ImageLoss, seen: Tensor
    ) -> tuple[ImageLoss, Tensor]:
        """L_GAN, and its weight λ, a number; both 0, without a pass, while the ramp is 0 on all processes."""
        if not any_of(bool((ramp > 0).any())):
            return ImageLoss.zero(image), image.new_zeros(())
        assert self.discriminator is not None
        l_gan = ImageLoss.of(generator_loss(_bare(self.discriminator)(image)), image)
        weight = image.new_tensor(self.loss.adversarial)
        if self.loss.adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(made, l_rec.gradient, l_gan.gradient, int(seen.max()))
        return l_gan, weight

    def fraction(self, seen: Tensor) -> Tensor:
        """The fraction of its weight that the discriminator has after so many images, [B] in 0..1, float32."""
        since = seen - self.loss.start
        fraction = (since >= 0).double() if self.loss.ramp == 0 else (since / self.loss.ramp).clamp(0, 1)
        return fraction.float()

    def _check_codebook(self) -> None:
        """Raises UserError where a codebook that has had time to learn is hardly used."""
        codec = _bare(self.codec)
        usage = codec.code_usage if isinstance(codec, LearnedCodec) and codec.latents_learn else None
        if usage is None or int(usage.batches) < _PATIENCE or float(usage.step_perplexity) >= _COLLAPSED:
            return
        raise UserError(
            f"the codebook has collapsed: all positions of a batch choose {float(usage.step_perplexity):.1f} codes. "
            "Lower the learning rate, or set codec.restart above 0 where it is not.",
            key="codec.restart",
            code="not_finite",
        )

    # ---- the discriminator's turn ---------------------------------------------------------------------------

    def _discriminator(self, x: Tensor, draw: Noise, seen: Tensor) -> Terms:
        """The loss of telling images from reconstructions, 0 before the start."""
        started = seen >= self.loss.start
        if not any_of(bool(started.any())):
            nothing = torch.zeros(len(x), device=x.device)
            logged = dict.fromkeys(("discriminator", "logits real", "logits fake"), nothing)
            return Terms(nothing.clone().requires_grad_(torch.is_grad_enabled()), logged)
        assert self.discriminator is not None
        fake = self._made.pop(draw.ids, None)
        if fake is None:  # the codec's turn did not have these samples
            with torch.no_grad():
                fake = self.codec(x, draw).image
        # One pass for each kind, as in the original: a batch norm's statistics are those of its kind alone.
        real, false = (self.discriminator(pictures).float().flatten(1) for pictures in (x, fake.to(x)))
        loss = discriminator_loss(real, false, self.loss.gan) * started
        logged = {"logits real": real.detach().mean(1), "logits fake": false.detach().mean(1)}
        return Terms(loss, logged | {"discriminator": loss.detach()})


def _bare(module: nn.Module) -> nn.Module:
    """The module without the wrapper that joins its gradients over processes: for use in another player's turn."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _moments(latent: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the unscaled latents over the batch, by channel where they are few."""
    channels = latent.float().transpose(0, 1).flatten(1)
    if len(channels) > _CHANNELS:
        return {"latent mean": channels.mean(), "latent std": channels.std()}
    moments: dict[str, Tensor] = {}
    for number, values in enumerate(channels):
        moments |= {f"latent mean {number}": values.mean(), f"latent std {number}": values.std()}
    return moments
