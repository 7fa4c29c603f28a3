"""The convolutional encoder and decoder of first stages: those of VQGAN and of latent diffusion's autoencoders.

Both are ADM's residual blocks without an embedding, with group norms of eps = 1e-6 (Esser et al. 2021, appendix A;
Rombach et al. 2022, appendix G). On the way down only the right and the bottom edge are padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.networks.backbone import Middle
from carrara.networks.fused import norm_silu
from carrara.networks.layers import (
    Downsample,
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    Upsample,
    convolution,
    largest_divisor,
)
from carrara.networks.memory import like_weights, weights_to_memory_format
from carrara.networks.params import LevelParams, check_multiples, times

EPS = 1e-6
"""Of every group norm here; the U-Nets have 1e-5."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams(LevelParams):
    """What encoder and decoder are made of.

    Attributes:
        in_channels: channels of the image.
        out_channels: channels of the decoded image; None for as many.
        blocks_per_level: residual blocks on each level of the encoder; the decoder has one more.
        latent_channels: channels of the latent.
        hidden_channels: channels between the convolutions and the 1×1 maps to and from the latent; None for
            `latent_channels`.
        encoder_map: whether the encoder ends with a 1×1 map (the originals' `quant_conv`).
        decoder_map: whether the decoder starts with one (`post_quant_conv`).
        attention: as of `LevelParams`, with one head.
        middle_attention: whether the middle attends (all published shapes but one do).
        learned_resampling: sizes change by 3-convolutions; False averages and repeats.
        tanh: the decoder ends with it, so that images lie within [-1, 1].
    """

    section: ClassVar[str] = "codec"

    in_channels: int = 3
    out_channels: int | None = None
    channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 4
    hidden_channels: int | None = None
    encoder_map: bool = True
    decoder_map: bool = True
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    learned_resampling: bool = True
    tanh: bool = False

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "in_channels", "blocks_per_level", "latent_channels")
        if self.hidden != self.latent_channels:
            self._needs("hidden_channels", "encoder_map", "decoder_map")

    @property
    def hidden(self) -> int:
        """Channels between the convolutions and the 1×1 maps."""
        return self.hidden_channels or self.latent_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(mult * self.channels) for mult in self.channel_mult)

    @property
    def reduction(self) -> int:
        """How many pixels one side of a latent position covers."""
        return self.factors[-1]

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless images of this size can be encoded.

        A side may not be divisible by the reduction (the nearest sizes are named), or the latent may have a single
        position and the group norm a single channel, which leaves nothing to normalise over.
        """
        check_multiples((height, width), self.reduction, f"a codec of reduction {self.reduction}", "data.resolution")
        deepest = self.widths[-1]
        if height == width == self.reduction and largest_divisor(deepest, self.norm_groups) == deepest:
            raise UserError(
                f"images of {times((height, width))} have a latent of one position, which {deepest} channels in as "
                "many groups (codec.norm_groups) cannot normalise: use larger images, fewer levels or fewer groups.",
                key="codec.norm_groups",
                code="shape",
            )


class Level(nn.Module):
    """The blocks of one resolution, each followed by self-attention where the level attends, and the resampling."""

    def __init__(
        self, blocks: list[ResidualBlock], attentions: list[SelfAttention], resample: Downsample | Upsample | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, H, W] to the next level's [B, C_i, H/2, W/2] or [B, C_i, 2·H, 2·W]."""
        for index, block in enumerate(self.blocks):
            h = block(h)  # [B, C_i, H, W]
            if self.attentions:
                h = self.attentions[index](h)  # [B, C_i, H, W]
        return h if self.resample is None else self.resample(h)  # [B, C_i, H/2, W/2] or [B, C_i, 2·H, 2·W]


class _Parts:
    """Makes the parts of encoder or decoder; `half` names the attention's sites."""

    def __init__(self, params: AutoencoderParams, half: str) -> None:
        self.params, self.half = params, half

    def block(self, channels: int, out_channels: int) -> ResidualBlock:
        p = self.params
        return ResidualBlock(
            2, channels, out_channels, groups=p.norm_groups, eps=EPS, dropout=p.dropout, checkpointing=p.checkpointing
        )

    def attention(self, site: str, channels: int) -> SelfAttention:
        p, name = self.params, f"{self.half}.{site}"
        return SelfAttention(
            name, 2, channels, heads=1, order="new", groups=p.norm_groups, eps=EPS, checkpointing=p.checkpointing
        )

    def level(self, index: int, channels: int, blocks: int, resample: Downsample | Upsample | None) -> Level:
        """A level of `blocks` blocks whose input has `channels` channels."""
        out = self.params.widths[index]
        attends = self.params.factors[index] in self.params.attention
        return Level(
            [self.block(channels if block == 0 else out, out) for block in range(blocks)],
            [self.attention(f"{index}.{block}", out) for block in range(blocks if attends else 0)],
            resample,
        )

    def middle(self) -> Middle:
        width = self.params.widths[-1]
        block_in = self.block(width, width)
        attention = self.attention("middle", width) if self.params.middle_attention else None
        return Middle(block_in, attention, self.block(width, width))


class Encoder(nn.Module):
    """Images [B, C, H, W] to what describes their latents, [B, moments·latent_channels, H/f, W/f].

    Args:
        params: the shape.
        moments: 1 for a latent, 2 for the mean and log-variance of one.
    """

    def __init__(self, params: AutoencoderParams, moments: int = 1) -> None:
        super().__init__()
        self.params = params
        self.stem = convolution(2, params.in_channels, params.channels)
        parts, width, last = _Parts(params, "encoder"), params.channels, len(params.widths) - 1
        levels = []
        for index, out in enumerate(params.widths):
            resample = None if index == last else Downsample(2, out, params.learned_resampling, pad_end=True)
            levels.append(parts.level(index, width, params.blocks_per_level, resample))
            width = out
        self.levels = nn.ModuleList(levels)
        self.middle = parts.middle()
        self.norm = GroupNorm(width, params.norm_groups, EPS)
        self.out = convolution(2, width, moments * params.hidden)
        latent = moments * params.latent_channels
        self.map = convolution(2, moments * params.hidden, latent, 1) if params.encoder_map else nn.Identity()
        weights_to_memory_format(self, params.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Args:
            x: [B, C, H, W] in [-1, 1], in the weights' type.

        Raises:
            UserError: another number of channels, or a side that the reduction does not divide.
        """
        if x.ndim != 4 or x.shape[1] != self.params.in_channels:
            raise UserError(
                f"this codec encodes [B, {self.params.in_channels}, H, W], not {list(x.shape)}.", key="x", code="shape"
            )
        self.params.check_size(*x.shape[2:])
        h = like_weights(x.to(self.stem.weight.dtype), self.stem)  # [B, C, H, W]
        h = self.stem(h)  # [B, C_0, H, W]
        for level in self.levels:
            h = level(h)  # [B, C_i, H/2^(i+1), W/2^(i+1)], of the last [B, C_n, H/f, W/f]
        h = norm_silu(self.norm, self.middle(h))  # [B, C_n, H/f, W/f]
        return self.map(self.out(h))  # type: ignore[no-any-return]  # [B, moments·latent_channels, H/f, W/f]


class Decoder(nn.Module):
    """Latents [B, latent_channels, H/f, W/f] to images [B, C, H, W]."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        width = params.widths[-1]
        mapped = convolution(2, params.latent_channels, params.hidden, 1)
        self.map = mapped if params.decoder_map else nn.Identity()
        self.stem = convolution(2, params.hidden, width)
        parts = _Parts(params, "decoder")
        self.middle = parts.middle()
        levels = []
        for index in reversed(range(len(params.widths))):
            resample = None if index == 0 else Upsample(2, params.widths[index], params.learned_resampling)
            levels.append(parts.level(index, width, params.blocks_per_level + 1, resample))
            width = params.widths[index]
        self.levels = nn.ModuleList(levels)
        """From the lowest resolution to the highest."""
        self.norm = GroupNorm(width, params.norm_groups, EPS)
        self.out = convolution(2, width, params.out_channels or params.in_channels)
        weights_to_memory_format(self, params.channels)

    def features(self, z: Tensor) -> Tensor:
        """The input of the last convolution, [B, channels, H, W]."""
        h = like_weights(z.to(self.stem.weight.dtype), self.stem)  # [B, latent_channels, h, w]
        h = self.middle(self.stem(self.map(h)))  # [B, C_n, h, w]
        for level in self.levels:
            h = level(h)  # [B, C_i, h·f/2^i, w·f/2^i]
        return norm_silu(self.norm, h)  # [B, C_0, H, W]

    def finish(self, features: Tensor) -> Tensor:
        """The image of the last convolution's input."""
        image: Tensor = self.out(features)  # [B, C, H, W]
        return torch.tanh(image) if self.params.tanh else image

    def forward(self, z: Tensor) -> Tensor:
        """z [B, latent_channels, h, w] to [B, C, H, W], about [-1, 1]."""
        return self.finish(self.features(z))
