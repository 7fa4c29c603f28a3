"""The spatial transformer of latent diffusion: a map's places as tokens that look at themselves and at a context.

Rombach et al. 2022, §3.3 and appendix E.2.1: self-attention, cross-attention and a gated feed-forward, each behind
its own layer norm and beside a skip, between two projections.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Attend, Condition
from carrara.errors import UserError
from carrara.networks.layers import HALF, Block, GroupNorm, attention, remembered, zeroed

NORM_EPS = 1e-6
"""The ε of the group norm before the tokens; the residual blocks beside it have 1e-5."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, in float32 where the input has less."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in HALF:
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class TokenAttention(nn.Module):
    """Tokens attend to a context: softmax(QKᵀ/√d)·V with Q from the tokens, K and V from the context."""

    def __init__(self, site: str, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.site = site
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(context_channels, channels, bias=False)
        self.v = nn.Linear(context_channels, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, context: Tensor, attend: Attend | None, mask: Tensor | None = None) -> Tensor:
        """tokens [B, L, C] and context [B, M, D], of which `mask` (bool [B, M]) says what may be seen: [B, L, C]."""
        q, k, v = (
            value.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L or M, d]
            for value in (self.q(tokens), self.k(context), self.v(context))
        )
        h = attention(self.site, q, k, v, attend, mask)
        return self.out(h.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedFeedForward(nn.Module):
    """GEGLU, (xW)·GELU(xV), four times as wide inside, and a linear map back (Shazeer 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.hidden(tokens).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention to the tokens themselves, attention to the context, feed-forward.

    Args:
        site: what the attention seam knows the block by; its layers ask as "SITE.self" and "SITE.cross".
        channels: C of the tokens.
        context_channels: D of the context; 0 leaves cross-attention out.
        heads: of both attentions.
        context_only: the first attention looks at the context too, and asks as "SITE.context".
    """

    def __init__(self, site: str, channels: int, context_channels: int, heads: int, context_only: bool) -> None:
        super().__init__()
        self.context_only = context_only
        name, seen = ("context", context_channels) if context_only else ("self", channels)
        self.norm_first = LayerNorm(channels)
        self.first = TokenAttention(f"{site}.{name}", channels, seen, heads)
        self.norm_cross = LayerNorm(channels) if context_channels else None
        self.cross = TokenAttention(f"{site}.cross", channels, context_channels, heads) if context_channels else None
        self.norm_feed = LayerNorm(channels)
        self.feed = GatedFeedForward(channels)

    def forward(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens [B, L, C] to [B, L, C]."""
        attend, mask = condition.attend, condition.context_mask
        normed = self.norm_first(tokens)
        if self.context_only:
            h = self.first(normed, _context(condition, tokens), attend, mask)
        else:
            h = self.first(normed, normed, attend)
        tokens = h.add_(tokens)
        if self.cross is not None and self.norm_cross is not None:
            h = self.cross(self.norm_cross(tokens), _context(condition, tokens), attend, mask)
            tokens = h.add_(tokens)
        return self.feed(self.norm_feed(tokens)).add_(tokens)  # type: ignore[no-any-return]


def _context(condition: Condition, tokens: Tensor) -> Tensor:
    if condition.context is None:
        raise UserError("this network needs the condition's context.")
    return condition.context.to(tokens)


class SpatialTransformer(Block):
    """Group norm, a projection, `depth` transformer blocks over the places, a projection, beside a skip.

    The last projection starts at zero. A 1×1-convolution and a linear map of tokens are the same projection, so
    that which of them an original has matters only to its checkpoints.

    Args:
        site: see `TransformerBlock`; with more than one block, block i is "SITE.i".
        channels: C of the map.
        context_channels: D of `Condition.context`; 0 makes a transformer that sees only the map.
        heads: attention heads.
        depth: how many blocks.
        groups: of the group norm.
        context_only: no block's first attention looks at the map.
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
        self.project_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """[B, C, *S] to [B, C, *S], told the condition's `context`, `context_mask` and `attend`."""
        places = self.norm(x).movedim(1, -1)  # [B, *S, C]: no copy where channels lie last
        tokens = self.project_in(places.flatten(1, -2).to(self.project_in.weight.dtype))
        for block in self.blocks:
            tokens = remembered(block, tokens, condition, forget=self.checkpointing)
        h = self.project_out(tokens).reshape(places.shape).movedim(-1, 1)
        return h.to(x.dtype).add_(x)  # type: ignore[no-any-return]
