"""The convolutional encoder and decoder of first stages: those of VQGAN and of latent diffusion's autoencoders.

Both are ADM's residual blocks without an embedding, with group norms of eps = 1e-6 (Esser et al. 2021, appendix A;
Rombach et al. 2022, appendix G). On the way down only the right and the bottom edge are padded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.networks.fused import norm_silu
from carrara.networks.layers import (
    Convolution,
    GroupNorm,
    SelfAttention,
    Upsample,
    convolution,
    largest_divisor,
    zero_module,
)
from carrara.networks.memory import channels_last, maybe_checkpoint

EPS = 1e-6
"""Of every group norm here; the U-Nets have 1e-5."""
WIDE = 48
"""From so many channels on, weights and maps lie in memory with their channels side by side: convolutions on a CPU are
then a tenth faster. They also round coarser there, which for narrow networks, of few sums, is the difference between
keeping 1e-5 to the originals and missing it."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams:
    """What encoder and decoder are made of. Plain data: `dataclasses.asdict` gives what JSON can hold.

    Attributes:
        in_channels: channels of the image.
        out_channels: channels of the decoded image; None for as many.
        channels: width of the first level, before `channel_mult`.
        channel_mult: width of each level, in units of `channels`; all levels but the last end with a halving.
        blocks_per_level: residual blocks on each level of the encoder; the decoder has one more.
        latent_channels: channels of the latent.
        hidden_channels: channels between the convolutions and the 1×1 maps to and from the latent; None for
            `latent_channels`.
        encoder_map: whether the encoder ends with a 1×1 map (the originals' `quant_conv`).
        decoder_map: whether the decoder begins with one (`post_quant_conv`).
        attention: downsampling factors of the levels whose every block is followed by self-attention of one head.
        middle_attention: whether the middle attends (all published shapes but one do).
        learned_resampling: sizes change by 3-convolutions; False averages and repeats.
        dropout: probability, in each residual block.
        tanh: the decoder ends with it, so that images lie within [-1, 1].
        norm_groups: groups of every group norm, or the largest divisor of the channels below that.
        checkpointing: compute each block again in the backward pass instead of storing it.
    """

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
    dropout: float = 0.0
    tanh: bool = False
    norm_groups: int = 32
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):  # what JSON and YAML call lists
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name in ("in_channels", "channels", "blocks_per_level", "latent_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"codec.{name} is {getattr(self, name)}: it must be at least 1.")
        if not self.channel_mult or min(self.widths) < 1:
            raise UserError(f"codec.channel_mult {list(self.channel_mult)} must give each level at least one channel.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"codec.dropout is {self.dropout}: it must be at least 0 and below 1.")
        unknown = sorted(set(self.attention) - set(self.factors))
        if unknown:
            raise UserError(
                f"codec.attention holds {unknown}, but the levels of this codec have the downsampling factors "
                f"{list(self.factors)}."
            )
        if self.hidden != self.latent_channels and not (self.encoder_map and self.decoder_map):
            raise UserError("codec.hidden_channels other than latent_channels need both encoder_map and decoder_map.")

    @property
    def hidden(self) -> int:
        """`hidden_channels`, or what stands for it."""
        return self.hidden_channels or self.latent_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(mult * self.channels) for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """Downsampling factor of each level."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def reduction(self) -> int:
        """How many pixels one side of a latent position covers."""
        return self.factors[-1]

    def check_size(self, height: int, width: int) -> None:
        """Whether images of this size can be encoded.

        Raises:
            UserError: a side is not divisible by the reduction; the nearest sizes are named. Or the latent has a single
                place, and a group norm a single channel: there is nothing to compare it with.
        """
        check_divisible(height, width, self.reduction, "a codec of reduction")
        width_there = self.widths[-1]
        if height == width == self.reduction and largest_divisor(width_there, self.norm_groups) == width_there:
            raise UserError(
                f"images of {height}×{width} have a latent of one place here, which {width_there} channels in as many "
                "groups (codec.norm_groups) cannot normalise: take larger images, fewer levels or fewer groups."
            )


def check_divisible(height: int, width: int, reduction: int, codec: str) -> None:
    """Whether images of this size can be made smaller by a factor.

    Args:
        codec: what makes them smaller, for the sentence, which goes on with the factor.

    Raises:
        UserError: a side is not divisible by it; the nearest sizes are named.
    """
    if height > 0 and width > 0 and height % reduction == 0 and width % reduction == 0:
        return
    below, above = (
        "×".join(str(max(1, (side + extra) // reduction) * reduction) for side in (height, width))
        for extra in (0, reduction - 1)
    )
    raise UserError(
        f"images of {height}×{width} do not fit {codec} {reduction}: each side must be a multiple of it, the nearest "
        f"sizes are {below} and {above}."
    )


class Block(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip."""

    def __init__(self, params: AutoencoderParams, channels: int, out_channels: int) -> None:
        super().__init__()
        self.checkpointing = params.checkpointing
        self.norm_in = GroupNorm(channels, params.norm_groups, EPS)
        self.conv_in = convolution(2, channels, out_channels)
        self.norm_out = GroupNorm(out_channels, params.norm_groups, EPS)
        self.dropout = nn.Dropout(params.dropout)
        self.conv_out = zero_module(convolution(2, out_channels, out_channels))
        self.skip = convolution(2, channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H, W]."""
        return maybe_checkpoint(self._forward, x, enabled=self.checkpointing)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(norm_silu(self.norm_in, x))
        h = self.conv_out(self.dropout(norm_silu(self.norm_out, h)))
        return h.add_(self.skip(x))  # type: ignore[no-any-return]


class Halve(nn.Module):
    """Half the size: a 3-convolution of stride 2 over the map padded at the right and the bottom, or averages."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one resolution, each followed by self-attention where the level attends, and the way on."""

    def __init__(self, blocks: list[Block], attentions: list[SelfAttention], resample: Halve | Upsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, h: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            h = block(h)
            if self.attentions:
                h = self.attentions[index](h)
        return h if self.resample is None else self.resample(h)


class Middle(nn.Module):
    """Residual block, self-attention, residual block at the lowest resolution."""

    def __init__(self, params: AutoencoderParams, site: str) -> None:
        super().__init__()
        width = params.widths[-1]
        self.block_in = Block(params, width, width)
        self.attention = _attention(params, f"{site}.middle", width) if params.middle_attention else None
        self.block_out = Block(params, width, width)

    def forward(self, h: Tensor) -> Tensor:
        h = self.block_in(h)
        if self.attention is not None:
            h = self.attention(h)
        return self.block_out(h)  # type: ignore[no-any-return]


def _lay_out(network: nn.Module, params: AutoencoderParams) -> None:
    """Bring the weights into the memory layout of the network's width; see `WIDE`."""
    if params.channels >= WIDE:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _like(x: Tensor, stem: Convolution) -> Tensor:
    """The input in the memory layout of the weights."""
    wide = stem.weight.is_contiguous(memory_format=torch.channels_last) and not stem.weight.is_contiguous()
    return channels_last(x) if wide else x.contiguous()


def _attention(params: AutoencoderParams, site: str, width: int) -> SelfAttention:
    return SelfAttention(
        site,
        2,
        width,
        heads=1,
        order="new",
        groups=params.norm_groups,
        eps=EPS,
        checkpointing=params.checkpointing,
    )


def _level(
    params: AutoencoderParams, site: str, index: int, width: int, blocks: int, resample: Halve | Upsample | None
) -> Level:
    """A level of `blocks` blocks whose input has `width` channels."""
    out = params.widths[index]
    attends = params.factors[index] in params.attention
    return Level(
        [Block(params, width if block == 0 else out, out) for block in range(blocks)],
        [_attention(params, f"{site}.{index}.{block}", out) for block in range(blocks if attends else 0)],
        resample,
    )


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
        width, last = params.channels, len(params.widths) - 1
        levels = []
        for index, out in enumerate(params.widths):
            resample = None if index == last else Halve(out, params.learned_resampling)
            levels.append(_level(params, "encoder", index, width, params.blocks_per_level, resample))
            width = out
        self.levels = nn.ModuleList(levels)
        self.middle = Middle(params, "encoder")
        self.norm = GroupNorm(width, params.norm_groups, EPS)
        self.out = convolution(2, width, moments * params.hidden)
        latent = moments * params.latent_channels
        self.map = convolution(2, moments * params.hidden, latent, 1) if params.encoder_map else nn.Identity()
        _lay_out(self, params)

    def forward(self, x: Tensor) -> Tensor:
        """Args:
            x: [B, C, H, W] in [-1, 1], in the weights' type.

        Raises:
            UserError: another number of channels, or a side that the reduction does not divide.
        """
        if x.ndim != 4 or x.shape[1] != self.params.in_channels:
            raise UserError(f"this codec encodes [B, {self.params.in_channels}, H, W], not {list(x.shape)}.")
        self.params.check_size(*x.shape[2:])
        h = self.stem(_like(x.to(self.stem.weight.dtype), self.stem))
        for level in self.levels:
            h = level(h)
        h = self.out(norm_silu(self.norm, self.middle(h)))
        return self.map(h)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents [B, latent_channels, H/f, W/f] to images [B, C, H, W]."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        width = params.widths[-1]
        mapped = convolution(2, params.latent_channels, params.hidden, 1)
        self.map = mapped if params.decoder_map else nn.Identity()
        self.stem = convolution(2, params.hidden, width)
        self.middle = Middle(params, "decoder")
        levels = []
        for index in reversed(range(len(params.widths))):
            resample = None if index == 0 else Upsample(2, params.widths[index], params.learned_resampling)
            levels.append(_level(params, "decoder", index, width, params.blocks_per_level + 1, resample))
            width = params.widths[index]
        self.levels = nn.ModuleList(levels)
        """From the lowest resolution to the highest."""
        self.norm = GroupNorm(width, params.norm_groups, EPS)
        self.out = convolution(2, width, params.out_channels or params.in_channels)
        _lay_out(self, params)

    def features(self, z: Tensor) -> Tensor:
        """What the last convolution sees, [B, channels, H, W]."""
        h = self.middle(self.stem(self.map(_like(z.to(self.stem.weight.dtype), self.stem))))
        for level in self.levels:
            h = level(h)
        return norm_silu(self.norm, h)

    def finish(self, features: Tensor) -> Tensor:
        """The image of some features."""
        image: Tensor = self.out(features)
        return torch.tanh(image) if self.params.tanh else image

    def forward(self, z: Tensor) -> Tensor:
        """z [B, latent_channels, h, w] to [B, C, H, W], about [-1, 1]."""
        return self.finish(self.features(z))
