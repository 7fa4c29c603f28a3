"""The encoder half of ADM's and latent diffusion's U-Net, which the U-Net and the noisy classifier have in common.

Dhariwal & Nichol 2021; Rombach et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.networks.layers import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    Upsample,
    convolution,
    count_heads,
    sinusoidal_embedding,
)
from carrara.networks.params import LevelParams, check_multiples, times
from carrara.networks.slots import InputParams
from carrara.networks.transformer import SpatialTransformer, TokenAttention


@dataclass(frozen=True, kw_only=True)
class BackboneParams(InputParams, LevelParams):
    """What the encoder is made of, in addition to its levels.

    Attributes:
        blocks_per_level: residual blocks on each level, one number for all or one for each (the decoder of a U-Net
            has one more).
        heads: attention heads; None leaves it to `head_channels`.
        head_channels: channels of one head; where both are None, the largest divisor up to 64.
        qkv_order: how the joint projection counts its channels, "new" or "legacy" (see `layers.split_heads`);
            matters only to checkpoints.
        adaptive_norm: the embedding scales and shifts the second norm (AdaGN); False adds it before.
        resampling: what changes the size: "residual" blocks (ADM), a "convolution" (Improved DDPM), or plain
            "pooling", that is averages on the way down and copies on the way up.
        transformer_depth: what attends: 0 is plain self-attention (ADM), n a spatial transformer of n blocks
            (latent diffusion); one number for all levels or one for each, of which the last is the middle's too.
        context_only: downsampling factors of the levels whose transformers never attend to the map itself
            (Stable Diffusion's up-sampler).
        context_only_middle: the same of the middle.
        projection: how the transformers' projections are laid out, "linear" or as 1×1-"convolution"; matters only
            to checkpoints.
    """

    blocks_per_level: int | tuple[int, ...] = 2
    heads: int | None = None
    head_channels: int | None = None
    qkv_order: Literal["new", "legacy"] = "new"
    adaptive_norm: bool = True
    resampling: Literal["residual", "convolution", "pooling"] = "residual"
    transformer_depth: int | tuple[int, ...] = 0
    context_only: tuple[int, ...] = ()
    context_only_middle: bool = False
    projection: Literal["linear", "convolution"] = "linear"

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "heads", "head_channels")
        one = self.heads is None or self.head_channels is None
        self._require(one, "heads", "and network.head_channels exclude each other: set one to null.", "conflict")
        self._check_per_level("blocks_per_level", 1)
        self._check_per_level("transformer_depth", 0)
        self._one_of("qkv_order", ("new", "legacy"))
        self._one_of("projection", ("linear", "convolution"))
        self._one_of("resampling", ("residual", "convolution", "pooling"))
        depth = any(self.depths) or not self.context_channels
        self._require(depth, "transformer_depth", "must be 1 or more for network.context_channels.", "missing")
        self._needs("context_only", "context_channels")
        self._needs("context_only_middle", "context_channels")
        self._factors_of_levels("context_only")
        self.check_size(*self.image_size)
        for width in self.attended_widths:
            count_heads(width, self.heads, self.head_channels)

    def _check_per_level(self, name: str, least: int) -> None:
        value = getattr(self, name)
        levels, each = len(self.channel_mult), value if isinstance(value, tuple) else (value,)
        fits = not isinstance(value, tuple) or len(value) == levels
        self._require(fits, name, f"{value} must have one entry for each of {levels} levels.")
        self._require(min(each) >= least, name, f"is {value}: it must be at least {least}.")

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
        fits = len(size) == self.dims
        self._require(fits, "image_size", f"has {self.dims} dimensions, the input {times(size)}.", "shape")
        levels = f"a network of {len(self.channel_mult)} levels"
        check_multiples(size[-2:], self.factors[-1], levels, "network.image_size")  # frames are never resampled


class Stage(nn.Module):
    """A residual block, followed by attention at the levels that attend."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | SpatialTransformer | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition) -> Tensor:
        """[B, C, *S] to [B, C', *S]."""
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h, condition)


class Level(nn.Module):
    """The stages of one resolution, and the way to the next one."""

    def __init__(self, stages: list[Stage], resample: Upsample | Downsample | ResidualBlock | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample


class Middle(nn.Module):
    """Residual block, attention (or none), residual block at the lowest resolution."""

    def __init__(
        self, block_in: ResidualBlock, attention: SelfAttention | SpatialTransformer | None, block_out: ResidualBlock
    ) -> None:
        super().__init__()
        self.block_in = block_in
        self.attention = attention
        self.block_out = block_out

    def forward(self, x: Tensor, embedding: Tensor | None = None, condition: Condition | None = None) -> Tensor:
        """[B, C, *S] to [B, C, *S]."""
        h = self.block_in(x, embedding)
        if self.attention is not None:
            h = self.attention(h, condition)
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
        """Times [B] to [B, 4·channels]."""
        waves = sinusoidal_embedding(time, self.channels).to(self.hidden.weight.dtype)
        return self.out(self.activation(self.hidden(waves)))  # type: ignore[no-any-return]


class Parts:
    """Makes the parts of a network from its params; each use specifies only what differs there."""

    def __init__(self, params: BackboneParams) -> None:
        self.params = params

    def block(self, channels: int, out_channels: int, resample: Upsample | Downsample | None = None) -> ResidualBlock:
        """A residual block, which changes the size where `resample` is given."""
        p = self.params
        return ResidualBlock(
            p.dims,
            channels,
            out_channels,
            embedding=p.embedding,
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
        """A residual block with the attention of its level, "SITE.self" where it has one."""
        p, factor = self.params, self.params.factors[level]
        block = self.block(channels, out_channels)
        if factor not in p.attention:
            return Stage(block, None)
        only = factor in p.context_only
        return Stage(block, self.attention(site, out_channels, p.depths[level], heads, context_only=only))

    def middle(self, channels: int) -> Middle:
        """Block, attention, block at the lowest resolution."""
        p = self.params
        attention = self.attention("middle", channels, p.depths[-1], context_only=p.context_only_middle)
        return Middle(self.block(channels, channels), attention, self.block(channels, channels))

    def resample(self, kind: type[Upsample | Downsample], channels: int) -> Upsample | Downsample | ResidualBlock:
        """The way to the next level: a block, a convolution, or pooling, as the params have it."""
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
        h = self.stem(x.to(self.stem.weight.dtype))  # [B, C_0, *S]
        maps = [h]
        for level in self.levels:
            for stage in level.stages:  # type: ignore[union-attr]
                h = stage(h, embedding, condition)  # [B, C_i, *S/2^i]
                maps.append(h)
            if level.resample is not None:
                h = level.resample(h, embedding)  # type: ignore[operator]  # [B, C_i, *S/2^(i+1)]
                maps.append(h)
        return self.middle(h, embedding, condition), maps  # [B, C_n, *S/2^n]


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
