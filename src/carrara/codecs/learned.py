"""The base of the codecs with weights: encoder and decoder, the latent scale, and decoding in half precision."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from carrara.codecs.base import Posterior
from carrara.codecs.quantiser import Usage
from carrara.devices import HALF
from carrara.errors import UserError
from carrara.networks.autoencoder import AutoencoderParams, Decoder, Encoder
from carrara.process.noise import Noise

DECODER = ("decoder.", "log_scale")
"""The weights that no latent depends on."""
STATISTICS = ("usage.", "quantiser.usage.", "quantiser.credit")
"""Buffers of training alone: how often codes were chosen, and which of them are restarted."""


class Reconstruction(NamedTuple):
    """The output of a codec's training pass. (A named tuple, since wrappers that distribute a module over processes
    look for tensors in its output.)

    Attributes:
        image: x̂, [B, C, H, W].
        features: the input of the decoder's last convolution, [B, F, H, W], for the adaptive weight.
        latent: the latent before the latent scale, [B, C', H', W'], detached.
        penalty: the loss of the latent, [B]: KL in nats per image dimension, or a mean squared distance to the codes.
        log_scale: ln b of a learned p(x|z), a number, or None.
        scalars: further values to log, [B] each or a single number.
        tanh: whether the image is the tanh of the last convolution's output.
    """

    image: Tensor
    features: Tensor
    latent: Tensor
    penalty: Tensor
    log_scale: Tensor | None
    scalars: dict[str, Tensor]
    tanh: bool = False


class LearnedCodec(nn.Module):
    """A codec with weights. `forward` is its training; `encode` and `decode` are its use.

    Args:
        params: the shape of encoder and decoder.
        moments: 1, or 2 where the encoder predicts mean and log-variance.

    Attributes:
        decoder_only: whether only the decoder may learn (see `train_decoder_only`).
    """

    kind: ClassVar[str]
    bounded = False

    def __init__(self, params: AutoencoderParams, moments: int = 1) -> None:
        super().__init__()
        self.params = params
        self.decoder_only = False
        self.encoder = Encoder(params, moments)
        self.decoder = Decoder(params)
        self.register_buffer("latent_shift", torch.zeros(params.latent_channels))
        self.register_buffer("latent_scale", torch.ones(params.latent_channels))

    latent_shift: Tensor
    latent_scale: Tensor

    @property
    def reduction(self) -> int:
        """How many pixels one side of a latent position covers."""
        return self.params.reduction

    @property
    def code_usage(self) -> Usage | None:
        """How often each code was chosen lately, where there is a codebook."""
        return None

    def _usage_scalars(self) -> dict[str, Tensor]:
        """The codebook's use, to be logged; nothing for held-out images and for latents that do not learn."""
        return self.code_usage.scalars() if self.code_usage is not None and self.latents_learn else {}

    def end_step(self) -> None:
        """Update, after a training step, what has no gradient: a codebook."""

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain data: `kind` and the arguments for `carrara.codecs.build`."""
        return {"kind": self.kind, "params": asdict(self.params)}

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The latent's [C', H', W'] for an image's [C, H, W].

        Raises:
            UserError: another number of channels, or a side that the reduction does not divide.
        """
        channels, height, width = shape
        if channels != self.params.in_channels:
            raise UserError(
                f"this codec encodes images of {self.params.in_channels} channels, not of {channels}: set "
                f"data.channels={self.params.in_channels} (for `carrara data encode`, --channels).",
                key="data.channels",
                code="shape",
            )
        self.params.check_size(height, width)
        return self.params.latent_channels, height // self.reduction, width // self.reduction

    @abstractmethod
    def encode(self, x: Tensor) -> Posterior:
        """Images [B, C, H, W] in [-1, 1] to their latent posterior or codes, scaled."""

    @abstractmethod
    def forward(self, x: Tensor, noise: Noise) -> Reconstruction:
        """The training pass.

        Args:
            x: images [B, C, H, W] in [-1, 1].
            noise: the samples' randomness; its row numbers are the images' global positions in the run.
        """

    def train_decoder_only(self) -> None:
        """Freeze all but the decoder, which is then fine-tuned while every latent stays the same."""
        self.decoder_only = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(DECODER))

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.decoder_only:
            self.encoder.eval()
        return self

    @property
    def latents_learn(self) -> bool:
        """Whether a training pass is under way in which the latents may change."""
        learns = any(parameter.requires_grad for parameter in self.encoder.parameters())
        return learns and self.training and torch.is_grad_enabled()

    # ---- the latent scale: multiplied after encoding, divided before decoding (Rombach et al. 2022, §G) ------

    def scaled(self, latent: Tensor) -> Tensor:
        """(latent - shift)·scale, [B, C', H', W']: about unit variance, what a diffusion model sees."""
        return (latent - channelwise(self.latent_shift)) * channelwise(self.latent_scale)

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of `scaled`.

        Raises:
            UserError: latents of another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.params.latent_channels:
            raise UserError(
                f"this codec decodes [B, {self.params.latent_channels}, h, w], not {list(z.shape)}.",
                key="z",
                code="shape",
            )
        return z / channelwise(self.latent_scale) + channelwise(self.latent_shift)

    def set_latent_scale(self, scale: float | Tensor, shift: float | Tensor = 0.0) -> None:
        """Store a latent scale: one number, or one for each of the latent's channels.

        Raises:
            UserError: a scale that is not positive and finite, or of another number of channels.
        """
        for name, value in (("scale", scale), ("shift", shift)):
            numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
            if len(numbers) not in (1, self.params.latent_channels):
                raise UserError(
                    f"a latent {name} of {len(numbers)} channels does not fit {self.params.latent_channels} channels.",
                    key=f"latent_{name}",
                    code="shape",
                )
            if not bool(numbers.isfinite().all()) or (name == "scale" and not bool((numbers > 0).all())):
                raise UserError(
                    f"the latent {name} {numbers.tolist()} is not usable: the codec's latents are constant.",
                    key=f"latent_{name}",
                    code="not_finite",
                )
            buffer: Tensor = getattr(self, f"latent_{name}")
            buffer.copy_(numbers.expand(self.params.latent_channels))

    # ---- decoding -------------------------------------------------------------------------------------------

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents [B, C', H', W'] to images [B, C, H, W], about [-1, 1].

        Raises:
            UserError: latents of another number of channels.
        """
        return self._decoded(self.unscaled(z))

    def _decoded(self, latent: Tensor) -> Tensor:
        """Decode an unscaled latent. Images that are not finite in half precision are decoded again in float32, with a
        warning; so are, without a second pass, images that are not finite in float32."""
        image: Tensor = self.decoder(latent)
        if bool(image.isfinite().all()):
            return image
        device = latent.device.type
        half = self.decoder.stem.weight.dtype in HALF or torch.is_autocast_enabled(device)
        if half and bool(latent.isfinite().all()):
            warnings.warn(
                f"decoding in {image.dtype} was not finite: it is done again in float32 (load the codec in float32 or "
                "bfloat16 to avoid that).",
                stacklevel=3,
            )
            wide = {name: value.float() for name, value in self.decoder.state_dict(keep_vars=True).items()}
            with torch.autocast(device, enabled=False):
                image = functional_call(self.decoder, wide, (latent.float(),))
        if not bool(image.isfinite().all()):
            warnings.warn("the decoded image is not finite: nor are latents or decoder weights.", stacklevel=3)
        return image

    def _reconstruct(
        self,
        latent: Tensor,
        penalty: Tensor,
        scalars: dict[str, Tensor],
        log_scale: Tensor | None = None,
        *,
        logged: Tensor | None = None,
    ) -> Reconstruction:
        """Decode an unscaled latent in training; `logged` is the latent to log in its place."""
        features = self.decoder.features(latent)
        image, logged = self.decoder.finish(features), latent if logged is None else logged
        return Reconstruction(image, features.detach(), logged.detach(), penalty, log_scale, scalars, self.params.tanh)


def initial_log_scale() -> nn.Parameter:
    """The initial ln b of a p(x|z) whose scale b is learned: b = 0.1.

    An optimiser moves it by about its learning rate a step, so thousands of steps lie between b = 1 and the 0.05 to
    0.2 of pictures in [-1, 1]. Until then the reconstruction would weigh next to nothing against the KL, and a latent
    that is once unused stays so; from below, the KL is what weighs little at first, which does no harm.
    """
    return nn.Parameter(torch.tensor(0.1).log())


def channelwise(value: Tensor) -> Tensor:
    """[C'] as [1, C', 1, 1], to broadcast against latents."""
    return value.reshape(1, -1, 1, 1)
