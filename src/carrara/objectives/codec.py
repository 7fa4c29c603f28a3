"""Training a codec: reconstruction, what the latent costs, how it looks, and a patch discriminator.

One objective serves the whole ladder (autoencoder, VAE, VQ-VAE, VQGAN, latent diffusion's first stages, discrete and
hierarchical VAE): its terms are switched by weights, see `LOSSES`. All terms are means over an image's dimensions, so
that "a KL weight of 1e-6" means what it does in latent diffusion, where reconstruction and KL are both sums
(Rombach et al. 2022, §G; Esser et al. 2021, eq. 5-7; docs/math.md §8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from carrara.codecs.learned import LearnedCodec, Reconstruction
from carrara.codecs.perceptual import Perceptual
from carrara.distributed import any_of, gather
from carrara.errors import UserError, nearest
from carrara.objectives.base import Examples, Terms
from carrara.process.noise import Noise
from carrara.similarity import ssim

Distance = Literal["l1", "l2"]
GAN = Literal["hinge", "logarithmic"]

CODEC, DISCRIMINATOR = "codec", "discriminator"
"""The players, in stepping order."""
_MOST = 1e4
_SMALL = 1e-4
"""Ceiling of the adaptive weight, and what keeps its denominator from 0 (Esser et al. 2021, eq. 7)."""
_COLLAPSED = 2.0
"""A codebook whose perplexity is below this carries hardly any information."""
_PATIENCE = 500
"""Steps after which a collapsed codebook is no longer a beginning."""
_CHANNELS = 16
"""Latents of more channels are logged as a whole."""


@dataclass(frozen=True, kw_only=True)
class CodecLoss:
    """Which terms a codec is trained on.

    Attributes:
        distance: reconstruction by |x - x̂| or (x - x̂)². With a codec's learned scale b these are the negative
            log-likelihoods of a Laplace and of a Gaussian distribution, up to constants.
        latent: weight of what the latent costs: the KL per image dimension (1 makes a VAE, 1e-6 a first stage of
            latent diffusion), or the quantiser's loss.
        perceptual: weight of the perceptual distance, in addition to the reconstruction; 0 leaves it out.
        adversarial: weight of the discriminator's loss; 0 leaves the discriminator out.
        gan: what the discriminator minimises: "hinge", or "logarithmic": it maximises ln D(x) + ln(1 - D(x̂)).
        adaptive: scale the discriminator's gradient to the reconstruction's, at the decoder's last layer.
        start: images seen before the discriminator begins to learn and to count. It starts untrained: expect a dip.
        ramp: over how many images its weight then rises to its full value; 0 at once.
    """

    distance: Distance = "l1"
    latent: float = 1.0
    perceptual: float = 0.0
    adversarial: float = 0.0
    gan: GAN = "hinge"
    adaptive: bool = True
    start: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        for name, known in (("distance", get_args(Distance)), ("gan", get_args(GAN))):
            if getattr(self, name) not in known:
                raise UserError(f"loss.{name} is '{getattr(self, name)}': {nearest(getattr(self, name), known)}")
        for name in ("latent", "perceptual", "adversarial", "start", "ramp"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} is {getattr(self, name)}: it must be at least 0.")


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
    """What codec and discriminator minimise, stepping in this order on the same batch.

    The discriminator gets the reconstructions that the codec's own turn made. Progress is counted in images: a
    sample's global position, which its randomness is addressed by, is the number of images seen before it.

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
            raise UserError("loss.perceptual is above 0, but there is no perceptual network: name its weights file.")
        if loss.adversarial and discriminator is None:
            raise UserError("loss.adversarial is above 0, but there is no discriminator.")
        self.codec, self.loss, self.perceptual = codec, loss, perceptual
        self.discriminator = discriminator if loss.adversarial else None
        self._made: dict[tuple[int, ...] | None, Tensor] = {}

    @property
    def players(self) -> dict[str, nn.Module]:
        if self.discriminator is None:
            return {CODEC: self.codec}
        return {CODEC: self.codec, DISCRIMINATOR: self.discriminator}

    def notices(self, images: int) -> list[str]:
        """What to tell the user before a run that will see so many images."""
        if self.discriminator is None or self.loss.start < images:
            return []
        return [
            f"the discriminator starts after {self.loss.start:,} images, but the run ends after {images:,}: it will "
            "never take part."
        ]

    def terms(self, batch: Examples, draw: Noise, player: str) -> Terms:
        """What a player minimises on clean images [B, C, H, W] in [-1, 1].

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
        made: Reconstruction = self.codec(x, draw)
        # The image's own terms are differentiated with respect to the image alone, once: the adaptive weight needs
        # these gradients, and the way from the image back to the weights is taken once, too.
        image = made.image.detach().float().requires_grad_(torch.is_grad_enabled())
        error, scalars = self._error(x, image)
        value, gradient = self._likelihood(error, image, made.log_scale)
        if made.log_scale is not None:
            scalars["learned scale"] = made.log_scale.detach().exp()
        if self.discriminator is not None:
            g_loss, g_grad = self._g_loss(image, seen, gradient, made, scalars)
            value, gradient = value + g_loss, gradient + g_grad
            if torch.is_grad_enabled() and bool((seen >= self.loss.start).any()):
                self._made[draw.ids] = made.image.detach()
        per_sample = value + self.loss.latent * made.penalty + _attached(made.image, gradient)
        scalars |= made.scalars | {"latent cost": made.penalty.detach(), **_spread(made.latent)}
        self._check_codebook()
        return Terms(per_sample, scalars)

    def _error(self, x: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and perceptual term, [B], and what to log."""
        difference = image - x
        squares = difference.square().flatten(1).mean(1)
        distance = squares if self.loss.distance == "l2" else difference.abs().flatten(1).mean(1)
        scalars = {
            "reconstruction": distance.detach(),
            "psnr": 10 * torch.log10(4 / squares.detach().clamp(min=1e-12)),  # peak 2 on [-1, 1], for each image
        }
        # Of all held-out images, but of one of a training pass: it costs more than all else here.
        some = slice(0, 1 if torch.is_grad_enabled() else None)
        with torch.no_grad():
            scalars["ssim"] = ssim(image[some], x[some])
        if self.loss.perceptual and self.perceptual is not None:
            seen = self.perceptual(image, x)
            scalars["perceptual"] = seen.detach()
            distance = distance + self.loss.perceptual * seen
        return distance, scalars

    def _likelihood(self, error: Tensor, image: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The error as a negative log-likelihood where the codec learns its scale b: |e|/b + ln b (Laplace), or
        e²/(2b²) + ln b (Gaussian).

        Returns:
            [B], differentiable in b only; its gradient with respect to the image.
        """
        gradient = _gradient(error, image)
        error = error.detach()
        if log_scale is None:
            return error, gradient
        squared = self.loss.distance == "l2"
        factor = 0.5 * torch.exp(-2 * log_scale) if squared else torch.exp(-log_scale)
        return error * factor + log_scale, gradient * factor.detach()

    def _g_loss(
        self, image: Tensor, seen: Tensor, gradient: Tensor, made: Reconstruction, scalars: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's term, [B] detached, and its gradient with respect to the image, both weighted."""
        fraction = self.fraction(seen)
        if not any_of(bool((fraction > 0).any()), image.device):
            scalars |= {"adversarial": torch.zeros_like(fraction), "adaptive weight": fraction.new_zeros(())}
            return torch.zeros_like(fraction), torch.zeros_like(image)
        assert self.discriminator is not None
        g_loss = -_bare(self.discriminator)(image).float().flatten(1).mean(1)
        g_grad = _gradient(g_loss, image)
        weight = image.new_tensor(self.loss.adversarial)
        if self.loss.adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(made, gradient, g_grad, int(seen.max()))
        scalars |= {"adversarial": g_loss.detach(), "adaptive weight": weight}
        weights = weight * fraction
        return weights * g_loss.detach(), weights.reshape(-1, 1, 1, 1) * g_grad

    def fraction(self, seen: Tensor) -> Tensor:
        """The fraction of its weight that the discriminator has after so many images, [B] in 0..1, float32."""
        since = seen - self.loss.start
        fraction = (since >= 0).double() if self.loss.ramp == 0 else (since / self.loss.ramp).clamp(0, 1)
        return fraction.float()

    def _check_codebook(self) -> None:
        """Raises UserError unless the codebook is in use, once it has had time to spread."""
        codec = _bare(self.codec)
        usage = codec.code_usage if isinstance(codec, LearnedCodec) and codec.latents_learn else None
        if usage is None or int(usage.batches) < _PATIENCE or float(usage.step_perplexity) >= _COLLAPSED:
            return
        raise UserError(
            f"the codebook has collapsed: all positions of a batch choose {float(usage.step_perplexity):.1f} codes. "
            "Lower the learning rate, or set codec.restart above 0 where it is not."
        )

    # ---- the discriminator's turn ---------------------------------------------------------------------------

    def _discriminator(self, x: Tensor, draw: Noise, seen: Tensor) -> Terms:
        started = seen >= self.loss.start
        if not any_of(bool(started.any()), x.device):
            nothing = torch.zeros(len(x), device=x.device)
            logged = dict.fromkeys(("discriminator", "logits real", "logits fake"), nothing)
            return Terms(nothing.clone().requires_grad_(torch.is_grad_enabled()), logged)
        assert self.discriminator is not None
        fake = self._made.pop(draw.ids, None)
        if fake is None:  # nobody took the codec's turn on these samples
            with torch.no_grad():
                fake = self.codec(x, draw).image
        # One pass for each kind, as in the original: a batch norm's statistics are those of its kind alone.
        real, false = (self.discriminator(pictures).float().flatten(1) for pictures in (x, fake.to(x)))
        loss = discriminator_loss(real, false, self.loss.gan) * started
        logged = {"logits real": real.detach().mean(1), "logits fake": false.detach().mean(1)}
        return Terms(loss, logged | {"discriminator": loss.detach()})


def discriminator_loss(real: Tensor, fake: Tensor, gan: GAN) -> Tensor:
    """What the discriminator minimises, from the logits [B, N] of real pictures and of reconstructions, [B].

    "hinge": ½·(max(0, 1 - real) + max(0, 1 + fake)); "logarithmic": -½·(ln D(x) + ln(1 - D(x̂))), D = sigmoid(logit).
    """
    if gan == "hinge":
        return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
    return 0.5 * (F.softplus(-real) + F.softplus(fake)).mean(1)


def adaptive_weight(made: Reconstruction, of_error: Tensor, of_g_loss: Tensor, seen: int = 0) -> Tensor:
    """λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 1e-4), at most 1e4; ∇ with respect to the decoder's last layer, of the mean over all
    processes' samples (Esser et al. 2021, eq. 7).

    The last layer is a convolution, so its gradient is made from the layer's input and the gradient at its output;
    the layer itself need not be whole on this process.

    Args:
        made: what the codec made.
        of_error, of_g_loss: gradients of the summed terms with respect to the image, [B, C, H, W].
        seen: how many images the run has seen, for the sentence.

    Raises:
        UserError: a gradient is not finite.
    """
    norms = [float(_last_layer_gradient(made, gradient).norm()) for gradient in (of_error, of_g_loss)]
    if not all(math.isfinite(norm) for norm in norms):
        raise UserError(
            f"the adaptive weight is not a number after {seen:,} images: the last layer's gradient is {norms[0]:g} of "
            f"the reconstruction and {norms[1]:g} of the discriminator's loss. Go back to an earlier checkpoint "
            "with a lower learning rate, or start the discriminator later."
        )
    return of_error.new_tensor(min(norms[0] / (norms[1] + _SMALL), _MOST))


def _last_layer_gradient(made: Reconstruction, gradient: Tensor) -> Tensor:
    """The gradient of a mean over samples with respect to the last layer's 3×3 kernel, over all processes' samples."""
    features = made.features.float()
    if made.tanh:
        gradient = gradient * (1 - made.image.detach().float().square())
    shape = (gradient.shape[1], features.shape[1], 3, 3)
    kernel = conv2d_weight(features, shape, gradient / len(gradient), padding=1)
    return gather(kernel[None]).mean(0)


def _gradient(value: Tensor, image: Tensor) -> Tensor:
    """The gradient of the summed values with respect to the image; zeros where gradients are off."""
    if not torch.is_grad_enabled():
        return torch.zeros_like(image)
    return torch.autograd.grad(value.sum(), image)[0]


def _attached(image: Tensor, gradient: Tensor) -> Tensor:
    """Zeros, [B], whose gradient with respect to the image is `gradient`."""
    through = (image.float() * gradient).flatten(1).sum(1)
    return through - through.detach()


def _bare(module: nn.Module) -> nn.Module:
    """The module without the wrapper that joins its gradients over processes: for use in another player's turn."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _spread(latent: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the unscaled latents over the batch, by channel where they are few."""
    channels = latent.float().transpose(0, 1).flatten(1)
    if len(channels) > _CHANNELS:
        return {"latent mean": channels.mean(), "latent std": channels.std()}
    found: dict[str, Tensor] = {}
    for number, values in enumerate(channels):
        found |= {f"latent mean {number}": values.mean(), f"latent std {number}": values.std()}
    return found
