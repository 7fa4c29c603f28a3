"""A small text encoder that is trained together with the network that reads it (Rombach et al. 2022, §3.3: τ_θ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks.layers import count_heads, sinusoidal_embedding
from carrara.networks.transformer import LayerNorm, TransformerBlock

POSITIONS = 0.02
"""The scale of the positions' embedding: as large as the words' own in the beginning."""


class TextTransformer(nn.Module):
    """Token ids to a context: embeddings with sinusoidal positions, self-attention blocks, a norm.

    Prompts are padded to one length and nothing is masked: the padding is embedded like a word.

    Args:
        vocabulary: how many ids there are.
        width: D of the context.
        layers: transformer blocks.
    """

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        heads = count_heads(width, None, None)
        self.blocks = nn.ModuleList(
            TransformerBlock(f"text.{index}", width, 0, heads, context_only=False) for index in range(layers)
        )
        self.norm = LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """int64 [B, L] to [B, L, D]; weights [B, L] scale each token's hidden state.

        Raises:
            UserError: ids of another shape.
        """
        if tokens.ndim != 2:
            raise UserError(
                f"the condition's tokens are of shape {tuple(tokens.shape)}: they must be [B, L].",
                key="tokens",
                code="shape",
            )
        places = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.embedding(tokens)  # [B, L, D]
        h = h + POSITIONS * sinusoidal_embedding(places, h.shape[2]).to(h)  # [B, L, D]
        for block in self.blocks:
            h = block(h, (tokens.shape[1],), Condition())  # [B, L, D]
        h = self.norm(h)
        return h if weights is None else h * weights.to(h).unsqueeze(2)  # type: ignore[no-any-return]
