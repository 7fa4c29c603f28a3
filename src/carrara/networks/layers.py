"""The layers that the convolutional networks have in common.

Feature maps are [B, C, *S], where S is (L,), (H, W) or (D, H, W) for signals of one, two or three
dimensions. Of three, the first is never resampled (frames, slices).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition, Site
from carrara.devices import HALF
from carrara.errors import UserError
from carrara.networks.fused import column, norm_silu, upsampled_convolution
from carrara.networks.memory import maybe_checkpoint
from carrara.networks.packed import Convolution2d

_CONVOLUTION: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: Convolution2d,
    3: nn.Conv3d,
}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


AnyModule = TypeVar("AnyModule", bound=nn.Module)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def convolution(dims: int, channels: int, out_channels: int, kernel: int = 3, **options: Any) -> Convolution:
    """A convolution over `dims` dimensions that keeps the size at stride 1, unless `padding` is among the options."""
    return _CONVOLUTION[dims](channels, out_channels, kernel, **{"padding": kernel // 2, **options})


class Block(nn.Module):
    """A part of a network that sharding gathers on its own, right before it is used."""


def blocks(network: nn.Module) -> list[nn.Module]:
    """A network's `Block`s, from input to output."""
    return [module for module in network.modules() if isinstance(module, Block)]


def zero_module(module: AnyModule) -> AnyModule:
    """The same module with every parameter 0, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_embedding(time: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of the time at geometrically spaced frequencies (Vaswani 2017; Ho 2020).

    Args:
        time: float or int [B], in the network's units; need not be whole.
        width: length of the result; an odd one ends with a zero.
        max_period: the longest wave length is 2π times this.

    Returns:
        float32 [B, width].
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = time.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(waves, (0, width % 2))


def largest_divisor(channels: int, most: int) -> int:
    """The largest divisor of `channels` that is not above `most`."""
    return next(d for d in range(min(most, channels), 0, -1) if channels % d == 0)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, in float32 where the input has less (Wu & He 2018).

    Has `groups` groups, or the largest divisor of `channels` below that.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__(largest_divisor(channels, groups), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *S] to [B, C, *S] in x's type."""
        if x.dtype in HALF:
            weight, bias = self.weight.float(), self.bias.float()  # half types themselves in a network turned into one
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class Upsample(nn.Module):
    """Twice the size by repeating neighbours; then, if `learned`, a 3-convolution."""

    def __init__(self, dims: int, channels: int, learned: bool) -> None:
        super().__init__()
        self.factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = convolution(dims, channels, channels) if learned else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """[B, C, *S] to [B, C, *2S]."""
        if self.conv is not None:
            return upsampled_convolution(x, self.conv.weight, self.conv.bias)
        return F.interpolate(x, scale_factor=self.factors, mode="nearest")

    def then(self, conv: Convolution, x: Tensor) -> Tensor:
        """conv(self(x)) for a 3-convolution, where nothing is learned here."""
        return upsampled_convolution(x, conv.weight, conv.bias)


class Downsample(nn.Module):
    """Half the size, by a 3-convolution of stride 2 if `learned`, else by averaging.

    The convolution pads both sides with zeros, with `pad_end` (images only) the right and the bottom one alone.
    """

    def __init__(self, dims: int, channels: int, learned: bool, pad_end: bool = False) -> None:
        super().__init__()
        self.dims, self.pad_end = dims, pad_end
        self.stride = (1, 2, 2) if dims == 3 else (2,) * dims
        padding = 0 if pad_end else 1
        self.conv = convolution(dims, channels, channels, stride=self.stride, padding=padding) if learned else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """[B, C, *S] to [B, C, *S/2]."""
        if self.conv is None:
            return _AVERAGE[self.dims](x, self.stride, self.stride)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)  # type: ignore[no-any-return]

    def then(self, conv: Convolution, x: Tensor) -> Tensor:
        """conv(self(x))."""
        return conv(self(x))  # type: ignore[no-any-return]


class ResidualBlock(Block):
    """x + f(x, embedding), f twice norm, SiLU, convolution (Dhariwal & Nichol 2021, §3).

    Adaptive: the second norm is GN(h)·(1 + scale) + shift, [scale, shift] a linear map of SiLU(embedding); else that
    map is added to h before the norm; without an embedding (first stages) there is neither. With `resample`, both
    branches change their size after the first SiLU.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        out_channels: int,
        *,
        embedding: int = 0,
        adaptive: bool = True,
        groups: int,
        eps: float = 1e-5,
        dropout: float,
        resample: Upsample | Downsample | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.resample = resample
        self.checkpointing = checkpointing
        self.norm_in = GroupNorm(channels, groups, eps)
        self.conv_in = convolution(dims, channels, out_channels)
        self.embed = nn.Linear(embedding, 2 * out_channels if adaptive else out_channels) if embedding else None
        self.norm_out = GroupNorm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_module(convolution(dims, out_channels, out_channels))
        self.skip = convolution(dims, channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x [B, C, *S] and the activated embedding [B, E] to [B, C', *S']."""
        return maybe_checkpoint(self._forward, x, embedding, enabled=self.checkpointing)

    def _forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        h = norm_silu(self.norm_in, x)  # [B, C, *S]
        if self.resample is None:
            h = self.conv_in(h)  # [B, C', *S]
        else:
            h, x = self.resample.then(self.conv_in, h), self.resample(x)  # [B, C', *S'], [B, C, *S']
        h = self._norm_out(h, embedding)  # [B, C', *S']
        h = self.conv_out(self.dropout(h))  # [B, C', *S']
        return h.add_(self.skip(x))  # type: ignore[no-any-return]

    def _norm_out(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        if self.embed is None:
            return norm_silu(self.norm_out, h)
        embedded = self.embed(embedding).to(h.dtype)  # [B, 2·C'] if adaptive, else [B, C']
        if self.adaptive:
            return norm_silu(self.norm_out, h, *embedded.chunk(2, dim=1))
        return norm_silu(self.norm_out, h.add_(column(embedded, h)))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    condition: Condition | None,
    *,
    name: str,
    kind: Literal["self", "cross", "temporal"],
    size: Sequence[int],
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(QKᵀ/√d)·V, or what the condition's attention seam makes of it: the one place where attention happens.

    Args:
        q: [B, heads, L, d].
        k, v: [B, heads, M, d].
        condition: may hold the seam.
        name, kind, size: see `Site`.
        mask: bool [B, M], True where k and v may be attended to; None is everywhere.

    Returns:
        [B, heads, L, d].
    """
    mask = None if mask is None else mask.to(q.device)
    if condition is not None and condition.attend is not None:
        return condition.attend(Site(name, kind, tuple(size), condition.branches), q, k, v, mask)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    low = torch.finfo(q.dtype).min / 2  # finite: a row that may attend to nothing gives no NaN
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, low)
    return F.scaled_dot_product_attention(q, k, v, bias[:, None, None])


def split_heads(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3·C] to three of [B, heads, N, d].

    The channels are counted as (q/k/v, head, d) in the "new" order, as (head, q/k/v, d) in the "legacy" one
    of Improved DDPM's checkpoints and most of ADM's.
    """
    batch, tokens, _ = qkv.shape
    if order == "new":
        q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).unbind(2)
    else:
        q, k, v = qkv.reshape(batch, tokens, heads, 3, -1).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def count_heads(channels: int, heads: int | None, head_channels: int | None) -> int:
    """The number of heads for `channels`: as given, or by the width of one, or the widest that fit up to 64.

    Raises:
        UserError: the channels cannot be divided among the heads.
    """
    if head_channels is None:
        count = heads if heads is not None else channels // largest_divisor(channels, 64)
    else:
        count = channels // head_channels
    if count < 1 or channels % count or (head_channels is not None and channels % head_channels):
        name, value = ("heads", heads) if head_channels is None else ("head_channels", head_channels)
        raise UserError(
            f"attention over {channels} channels cannot be split with {name} = {value}: choose a divisor.",
            key=f"network.{name}",
        )
    return count


class SelfAttention(Block):
    """x + attention of every position to every other (Vaswani 2017; Ho 2020)."""

    def __init__(
        self,
        site: str,
        dims: int,
        channels: int,
        heads: int,
        *,
        order: str,
        groups: int,
        eps: float = 1e-5,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.site = site
        self.heads = heads
        self.order = order
        self.checkpointing = checkpointing
        self.norm = GroupNorm(channels, groups, eps)
        self.qkv = convolution(dims, channels, 3 * channels, 1)
        self.out = zero_module(convolution(dims, channels, channels, 1))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, C, *S] to [B, C, *S], with the condition's attention seam."""
        return maybe_checkpoint(self._forward, x, condition, enabled=self.checkpointing)

    def _forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, N, 3·C]
        q, k, v = split_heads(qkv, self.heads, self.order)  # [B, heads, N, d]
        h = attention(q, k, v, condition, name=self.site, kind="self", size=x.shape[2:])  # [B, heads, N, d]
        h = h.transpose(1, 2).flatten(2)  # [B, N, C]
        return self.out(h.transpose(1, 2).reshape(x.shape)).add_(x)  # type: ignore[no-any-return]
