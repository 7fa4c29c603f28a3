"""The spatial transformer of latent diffusion: a map's positions as tokens that attend to themselves and to a context.

Rombach et al. 2022, §3.3 and appendix E.2.1: self-attention, cross-attention and a gated feed-forward, each after its
own layer norm and added to its input, between two projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.devices import HALF
from carrara.errors import UserError
from carrara.networks.layers import Block, GroupNorm, attention, zero_module
from carrara.networks.memory import maybe_checkpoint

NORM_EPS = 1e-6
"""The ε of the group norm before the tokens; the residual blocks have 1e-5."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, in float32 where the input has less."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in HALF:
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class TokenAttention(nn.Module):
    """Tokens attend to themselves or to the context: softmax(QKᵀ/√d)·V, Q from the tokens, K and V from the other.

    Args:
        name: of its `Site`.
        kind: "self" attends to the tokens, "cross" to `Condition.context` where `Condition.context_mask` is True.
        channels: C of the tokens.
        context_channels: D of what is attended to.
        heads: attention heads.
    """

    def __init__(
        self, name: str, kind: Literal["self", "cross"], channels: int, context_channels: int, heads: int
    ) -> None:
        super().__init__()
        self.site = name
        self.kind: Literal["self", "cross"] = kind
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(context_channels, channels, bias=False)
        self.v = nn.Linear(context_channels, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, size: Sequence[int], condition: Condition) -> Tensor:
        """tokens [B, L, C] of a map of this size to [B, L, C]."""
        seen, mask = tokens, None
        if self.kind == "cross":
            if condition.context is None:
                raise UserError("this network needs the condition's context.", key="context", code="missing")
            seen, mask = condition.context.to(tokens), condition.context_mask
        q, k, v = (
            value.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L or M, d]
            for value in (self.q(tokens), self.k(seen), self.v(seen))
        )
        h = attention(q, k, v, condition, name=self.site, kind=self.kind, size=size, mask=mask)  # [B, heads, L, d]
        return self.out(h.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedFeedForward(nn.Module):
    """GEGLU, (xW)·GELU(xV), four times as wide inside, and a linear map back (Shazeer 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, C] to [B, L, C]."""
        value, gate = self.hidden(tokens).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward, each added to its input.

    Args:
        site: its layers are the sites "SITE.self" and "SITE.cross".
        channels: C of the tokens.
        context_channels: D of the context; 0 leaves cross-attention out.
        heads: of both attentions.
        context_only: the first attention attends to the context, too, at the site "SITE.context".
    """

    def __init__(self, site: str, channels: int, context_channels: int, heads: int, context_only: bool) -> None:
        super().__init__()
        self.norm_first = LayerNorm(channels)
        if context_only:
            self.first = TokenAttention(f"{site}.context", "cross", channels, context_channels, heads)
        else:
            self.first = TokenAttention(f"{site}.self", "self", channels, channels, heads)
        self.norm_cross = LayerNorm(channels) if context_channels else None
        self.cross = None
        if context_channels:
            self.cross = TokenAttention(f"{site}.cross", "cross", channels, context_channels, heads)
        self.norm_feed = LayerNorm(channels)
        self.feed = GatedFeedForward(channels)

    def forward(self, tokens: Tensor, size: Sequence[int], condition: Condition) -> Tensor:
        """tokens [B, L, C] of a map of this size to [B, L, C]."""
        tokens = self.first(self.norm_first(tokens), size, condition).add_(tokens)
        if self.cross is not None and self.norm_cross is not None:
            tokens = self.cross(self.norm_cross(tokens), size, condition).add_(tokens)
        return self.feed(self.norm_feed(tokens)).add_(tokens)  # type: ignore[no-any-return]


class SpatialTransformer(Block):
    """x + f(x), f a group norm, a projection, `depth` transformer blocks over the positions, a projection.

    The last projection starts at zero. A 1×1-convolution and a linear map of tokens are the same projection: which of
    them an original has matters only to its checkpoints.

    Args:
        site: see `TransformerBlock`; with more than one block, block i is "SITE.i".
        channels: C of the map.
        context_channels: D of `Condition.context`; 0 leaves cross-attention out.
        heads: attention heads.
        depth: how many blocks.
        groups: of the group norm.
        context_only: no block's first attention attends to the map.
        checkpointing: compute each block again in the backward pass instead of storing it.
    """

    def __init__(
        self,
        site: str,
        channels: int,
        context_channels: int,
        heads: int,
        *,
        depth: int = 1,
        groups: int = 32,
        context_only: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm = GroupNorm(channels, groups, NORM_EPS)
        self.project_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(site if depth == 1 else f"{site}.{index}", channels, context_channels, heads, context_only)
            for index in range(depth)
        )
        self.project_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """[B, C, *S] to [B, C, *S]; reads the condition's `context`, `context_mask` and `attend`."""
        positions = self.norm(x).movedim(1, -1)  # [B, *S, C]: no copy where channels lie last
        tokens = self.project_in(positions.flatten(1, -2).to(self.project_in.weight.dtype))  # [B, L, C]
        for block in self.blocks:
            tokens = maybe_checkpoint(block, tokens, x.shape[2:], condition, enabled=self.checkpointing)  # [B, L, C]
        h = self.project_out(tokens).reshape(positions.shape).movedim(-1, 1)  # [B, C, *S]
        return h.to(x.dtype).add_(x)  # type: ignore[no-any-return]
