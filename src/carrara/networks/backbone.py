"""The encoder half of ADM's and latent diffusion's U-Net, which the U-Net and the noisy classifier have in common.

Dhariwal & Nichol 2021; Rombach et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks.layers import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    Upsample,
    convolution,
    count_heads,
    sinusoidal_embedding,
)
from carrara.networks.slots import InputParams
from carrara.networks.transformer import SpatialTransformer, TokenAttention


@dataclass(frozen=True, kw_only=True)
class BackboneParams(InputParams):
    """What the encoder is made of.

    Attributes:
        channels: width of the first level, before `channel_mult`.
        channel_mult: width of each level, in units of `channels`; all levels but the last end with a halving.
        blocks_per_level: residual blocks on each level, one number for all or one for each (the decoder of a U-Net
            has one more).
        attention: downsampling factors of the levels whose every block is followed by self-attention: (2, 4)
            are the 16×16 and 8×8 maps of a 32×32 image. The middle always attends.
        heads: attention heads; None leaves it to `head_channels`.
        head_channels: channels of one head; where both are None, the largest divisor up to 64.
        qkv_order: how the joint projection counts its channels, "new" or "legacy" (see `layers.split_heads`);
            matters only to checkpoints.
        adaptive_norm: the embedding scales and shifts the second norm (AdaGN); False adds it before.
        resampling: what changes the size: "residual" blocks (ADM), a "convolution" (Improved DDPM), or plain
            "pooling", that is averages on the way down and copies on the way up.
        dropout: probability, in each residual block.
        transformer_depth: what attends: 0 is plain self-attention (ADM), n a spatial transformer of n blocks
            (latent diffusion); one number for all levels or one for each, of which the last is the middle's too.
        context_only: downsampling factors of the levels whose transformers never attend to the map itself
            (Stable Diffusion's up-sampler).
        context_only_middle: the same of the middle.
        projection: how the transformers' projections are laid out, "linear" or as 1×1-"convolution"; matters only
            to checkpoints.
        norm_groups: groups of every group norm, or the largest divisor of the channels below that.
        checkpointing: compute each block again in the backward pass instead of storing it.
    """

    channels: int = 64
    channel_mult: tuple[float, ...] = (1, 2, 2)
    blocks_per_level: int | tuple[int, ...] = 2
    attention: tuple[int, ...] = (2, 4)
    heads: int | None = None
    head_channels: int | None = None
    qkv_order: Literal["new", "legacy"] = "new"
    adaptive_norm: bool = True
    resampling: Literal["residual", "convolution", "pooling"] = "residual"
    dropout: float = 0.0
    transformer_depth: int | tuple[int, ...] = 0
    context_only: tuple[int, ...] = ()
    context_only_middle: bool = False
    projection: Literal["linear", "convolution"] = "linear"
    norm_groups: int = 32
    checkpointing: bool = False

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "channels", "norm_groups", "heads", "head_channels")
        if not self.channel_mult or min(self.widths) < 1:
            raise UserError(
                f"network.channel_mult {self.channel_mult} must give each level at least one channel.",
                key="network.channel_mult",
            )
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"network.dropout is {self.dropout}: it must be at least 0 and below 1.", key="network.dropout"
            )
        if self.heads is not None and self.head_channels is not None:
            raise UserError(
                "network.heads and network.head_channels exclude each other: set one of them to null.",
                key="network.heads",
                code="conflict",
            )
        self._check_per_level("blocks_per_level", 1)
        self._check_per_level("transformer_depth", 0)
        self._one_of("qkv_order", ("new", "legacy"))
        self._one_of("projection", ("linear", "convolution"))
        self._one_of("resampling", ("residual", "convolution", "pooling"))
        self._check_context()
        for name in ("attention", "context_only"):
            unknown = sorted(set(getattr(self, name)) - set(self.factors))
            if unknown:
                raise UserError(
                    f"network.{name} holds {unknown}, but the levels of this network have the downsampling "
                    f"factors {list(self.factors)}.",
                    key=f"network.{name}",
                )
        self.check_size(*self.image_size)
        for width in self.attended_widths:
            count_heads(width, self.heads, self.head_channels)

    def _check_per_level(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, tuple) and len(value) != len(self.channel_mult):
            raise UserError(
                f"network.{name} {value} must have one entry for each of {len(self.channel_mult)} levels.",
                key=f"network.{name}",
            )
        if min(value if isinstance(value, tuple) else (value,)) < least:
            raise UserError(f"network.{name} is {value}: it must be at least {least}.", key=f"network.{name}")

    def _check_context(self) -> None:
        if self.context_channels and not any(self.depths):
            raise UserError(
                "network.context_channels needs transformers: set network.transformer_depth to 1 or more.",
                key="network.transformer_depth",
                code="missing",
            )
        self._needs("context_only", "context_channels")
        self._needs("context_only_middle", "context_channels")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.channels) for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """Downsampling factor of each level."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level."""
        each = self.blocks_per_level
        return each if isinstance(each, tuple) else (each,) * len(self.channel_mult)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks of each level's attention, 0 for plain self-attention; the last is the middle's too."""
        each = self.transformer_depth
        return each if isinstance(each, tuple) else (each,) * len(self.channel_mult)

    @property
    def attended_widths(self) -> tuple[int, ...]:
        """Channels of the levels that attend, and of the middle."""
        levels = zip(self.widths, self.factors, strict=True)
        return (*(width for width, factor in levels if factor in self.attention), self.widths[-1])

    @property
    def embedding(self) -> int:
        """Width of the embedding of time and condition."""
        return 4 * self.channels

    def check_size(self, *size: int) -> None:
        """Raises UserError unless the network can take an input of this size, e.g. `check_size(height, width)`.

        Where a side cannot be halved often enough, the nearest allowed sizes are named.
        """
        if len(size) != self.dims:
            raise UserError(
                f"the network takes inputs of {self.dims} dimensions, not of size {size}.",
                key="network.image_size",
                code="shape",
            )
        factor = self.factors[-1]
        resampled = size[-2:]
        if all(side > 0 and side % factor == 0 for side in resampled):
            return
        below = [max(side // factor, 1) * factor for side in resampled]
        above = [-(-max(side, 1) // factor) * factor for side in resampled]
        raise UserError(
            f"the size {'×'.join(map(str, size))} does not fit a network of {len(self.channel_mult)} levels: "
            f"each side must be a multiple of {factor}, the nearest are {'×'.join(map(str, below))} "
            f"and {'×'.join(map(str, above))}.",
            key="network.image_size",
            code="shape",
        )


class Stage(nn.Module):
    """A residual block, followed by attention at the levels that attend."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | SpatialTransformer | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition) -> Tensor:
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h, condition)


class Level(nn.Module):
    """The stages of one resolution, and the way to the next one."""

    def __init__(self, stages: list[Stage], resample: Upsample | Downsample | ResidualBlock | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(
        self, block_in: ResidualBlock, attention: SelfAttention | SpatialTransformer, block_out: ResidualBlock
    ) -> None:
        super().__init__()
        self.block_in = block_in
        self.attention = attention
        self.block_out = block_out

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition) -> Tensor:
        h = self.attention(self.block_in(x, embedding), condition)
        return self.block_out(h, embedding)  # type: ignore[no-any-return]


class TimeEmbedding(nn.Module):
    """Sinusoids, Linear, SiLU, Linear: [B] times to [B, 4·channels]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = nn.Linear(channels, width)
        self.activation = nn.SiLU()
        self.out = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        waves = sinusoidal_embedding(time, self.channels).to(self.hidden.weight.dtype)
        return self.out(self.activation(self.hidden(waves)))  # type: ignore[no-any-return]


class Parts:
    """Makes the parts of a network from its params: each use gives only what differs there."""

    def __init__(self, params: BackboneParams) -> None:
        self.params = params

    def block(self, channels: int, out_channels: int, resample: Upsample | Downsample | None = None) -> ResidualBlock:
        p = self.params
        return ResidualBlock(
            p.dims,
            channels,
            out_channels,
            p.embedding,
            adaptive=p.adaptive_norm,
            groups=p.norm_groups,
            dropout=p.dropout,
            resample=resample,
            checkpointing=p.checkpointing,
        )

    def attention(
        self, site: str, channels: int, depth: int, heads: int | None = None, *, context_only: bool = False
    ) -> SelfAttention | SpatialTransformer:
        """Self-attention, or a transformer of `depth` blocks; `heads` overrides the params' number."""
        p = self.params
        count = count_heads(channels, heads if heads is not None else p.heads, p.head_channels)
        if not depth:
            return SelfAttention(
                f"{site}.self",
                p.dims,
                channels,
                count,
                order=p.qkv_order,
                groups=p.norm_groups,
                checkpointing=p.checkpointing,
            )
        return SpatialTransformer(
            site,
            channels,
            p.context_channels,
            count,
            depth=depth,
            groups=p.norm_groups,
            context_only=context_only,
            checkpointing=p.checkpointing,
        )

    def stage(self, site: str, level: int, channels: int, out_channels: int, heads: int | None = None) -> Stage:
        p, factor = self.params, self.params.factors[level]
        block = self.block(channels, out_channels)
        if factor not in p.attention:
            return Stage(block, None)
        only = factor in p.context_only
        return Stage(block, self.attention(site, out_channels, p.depths[level], heads, context_only=only))

    def middle(self, channels: int) -> Middle:
        p = self.params
        attention = self.attention("middle", channels, p.depths[-1], context_only=p.context_only_middle)
        return Middle(self.block(channels, channels), attention, self.block(channels, channels))

    def resample(self, kind: type[Upsample | Downsample], channels: int) -> Upsample | Downsample | ResidualBlock:
        p = self.params
        if p.resampling == "residual":
            return self.block(channels, channels, kind(p.dims, channels, learned=False))
        return kind(p.dims, channels, learned=p.resampling == "convolution")


class Encoder(nn.Module):
    """Stem, levels from fine to coarse, middle."""

    def __init__(self, params: BackboneParams, in_channels: int) -> None:
        super().__init__()
        parts = Parts(params)
        width = params.widths[0]
        self.stem = convolution(params.dims, in_channels, width)
        self.skips = [width]
        levels = []
        for level, out in enumerate(params.widths):
            stages = []
            for index in range(params.blocks[level]):
                stages.append(parts.stage(f"down.{level}.{index}", level, width, out))
                width = out
            last = level == len(params.widths) - 1
            levels.append(Level(stages, None if last else parts.resample(Downsample, width)))
            self.skips += [width] * (len(stages) + (not last))
        self.levels = nn.ModuleList(levels)
        self.middle = parts.middle(width)

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition) -> tuple[Tensor, list[Tensor]]:
        """x [B, C, *S] and the activated embedding [B, E]: the middle's output, and each map before."""
        h = self.stem(x.to(self.stem.weight.dtype))
        maps = [h]
        for level in self.levels:
            for stage in level.stages:  # type: ignore[union-attr]
                h = stage(h, embedding, condition)
                maps.append(h)
            if level.resample is not None:
                h = level.resample(h, embedding)  # type: ignore[operator]
                maps.append(h)
        return self.middle(h, embedding, condition), maps


def cast_torso(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the convolutions of encoder and decoder, and the linear maps of their transformers, to `dtype`, in place.

    Norms, embeddings and the output stay in float32: what guided-diffusion's `use_fp16` does.
    """
    for name in ("encoder", "decoder"):
        torso = getattr(network, name, None)
        for module in [] if torso is None else torso.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                module.to(dtype)
            if isinstance(module, SpatialTransformer):
                for part in module.modules():
                    if isinstance(part, nn.Linear):
                        part.to(dtype)


def attention_sites(network: nn.Module) -> tuple[str, ...]:
    """The names of a network's attention layers (see `Site`), in their order."""
    return tuple(module.site for module in network.modules() if isinstance(module, SelfAttention | TokenAttention))
