"""The diffusion transformer with adaLN-Zero blocks (Peebles & Xie 2023, §3.2).

The image is cut into patches, which are the tokens of a plain transformer. Time, class and vector scale and shift each
layer norm and gate each residual branch; all gates start at 0, so that every block starts as the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.networks.backbone import TimeEmbedding
from carrara.networks.layers import Block, attention, count_heads, split_heads, zero_module
from carrara.networks.memory import maybe_checkpoint
from carrara.networks.params import check_multiples, times
from carrara.networks.slots import ConditionedNetwork, ConditionedParams
from carrara.networks.transformer import LayerNorm, TokenAttention

TIME_WAVES = 256
"""Width of the sinusoidal embedding of the time."""
EPS = 1e-6
"""Of every layer norm."""

_SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PUBLISHED: dict[str, dict[str, int]] = {
    f"DiT-{name}/{patch}": {"width": width, "depth": depth, "heads": heads, "patch_size": patch}
    for name, (width, depth, heads) in _SHAPES.items()
    for patch in (2, 4, 8)
}
"""The published shapes (Table 1)."""


@dataclass(frozen=True, kw_only=True)
class DiTParams(ConditionedParams):
    """What the diffusion transformer is made of.

    Attributes:
        patch_size: side of a patch; each side of the image must be a multiple of it.
        width: channels of a token, a multiple of 4 and of `heads`.
        depth: blocks.
        heads: attention heads of each block.
        mlp_ratio: width of the feed-forward's hidden layer, in units of `width`.
        dropout: probability, of each residual branch's output.
        checkpointing: compute each block again in the backward pass instead of storing it.
    """

    patch_size: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    checkpointing: bool = False

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "patch_size", "width", "depth", "heads")
        self._only_images("image_size", "of a diffusion transformer is for")
        self._require(self.width % 4 == 0, "width", f"is {self.width}: it must be a multiple of 4.")
        hidden = self.mlp_ratio * self.width
        self._require(hidden >= 1, "mlp_ratio", f"is {self.mlp_ratio}: it must be above 0.")
        self._fraction("dropout")
        count_heads(self.width, self.heads, None)
        self.check_size(*self.image_size)

    @classmethod
    def published(cls, name: str, **changes: Any) -> Self:
        """The params of a published shape, "DiT-XL/2".

        Raises:
            UserError: there is no such shape.
        """
        if name not in PUBLISHED:
            sentence = f"there is no published shape '{name}': {nearest(name, PUBLISHED)}"
            raise UserError(sentence, key="name", code="unknown")
        return cls(**{**PUBLISHED[name], **changes})

    @property
    def factors(self) -> tuple[int, ...]:
        """Downsampling factors: of the image, and of the tokens."""
        return 1, self.patch_size

    def check_size(self, *size: int) -> None:
        """Raises UserError unless the image, e.g. `check_size(height, width)`, can be cut into patches."""
        self._require(len(size) == 2, "image_size", f"has 2 dimensions, the input {times(size)}.", "shape")
        check_multiples(size, self.patch_size, f"patches of {times((self.patch_size,) * 2)}", "network.image_size")


def position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """Sinusoidal embedding of a grid's positions, float32 [rows·columns, width].

    The first half holds sines, then cosines, of the column, the second half those of the row, at the frequencies
    10000^(-4k/width), k = 0…width/4 - 1.
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, for tokens x [B, L, D] and shift and scale [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(Block):
    """x + gate·attention(adaLN(x)), cross-attention where there is a context, x + gate·MLP(adaLN(x)).

    The paper's adaLN-Zero block has no context; its cross-attention block (Figure 3) adds the layer after the
    self-attention, with a norm of its own. Its output starts at zero, too.
    """

    def __init__(self, site: str, params: DiTParams) -> None:
        super().__init__()
        width, hidden = params.width, int(params.mlp_ratio * params.width)
        self.site = site
        self.heads = params.heads
        self.norm = LayerNorm(width, EPS, elementwise_affine=False)
        self.modulation = zero_module(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.cross = None
        if params.context_channels:
            self.cross = TokenAttention(f"{site}.cross", "cross", width, params.context_channels, params.heads)
            zero_module(self.cross.out)
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(params.dropout)

    def forward(self, x: Tensor, embedding: Tensor, size: Sequence[int], condition: Condition) -> Tensor:
        """Tokens [B, L, D] of a map of this size and the activated embedding [B, D] to tokens [B, L, D]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding).chunk(6, dim=1)  # each [B, D]
        qkv = self.qkv(modulate(self.norm(x), shift_1, scale_1))  # [B, L, 3·D]
        q, k, v = split_heads(qkv, self.heads, "new")  # [B, heads, L, d]
        h = attention(q, k, v, condition, name=f"{self.site}.self", kind="self", size=size)  # [B, heads, L, d]
        h = self.attention_out(h.transpose(1, 2).flatten(2))  # [B, L, D]
        x = x + gate_1[:, None] * self.dropout(h)
        if self.cross is not None:
            x = x + self.cross(self.norm(x), size, condition)
        h = self.hidden(modulate(self.norm(x), shift_2, scale_2))  # [B, L, mlp_ratio·D]
        h = self.out(F.gelu(h, approximate="tanh"))  # [B, L, D]
        return x + gate_2[:, None] * self.dropout(h)  # type: ignore[no-any-return]


class DiT(ConditionedNetwork):
    """`raw = network(x, network_time, condition)`, a diffusion transformer. Its output starts at zero."""

    params: DiTParams

    def __init__(self, params: DiTParams) -> None:
        super().__init__()
        self.params = params
        patch, width = params.patch_size, params.width
        self.patches = nn.Conv2d(params.in_channels + params.concat_channels, width, patch, patch)
        self.time = TimeEmbedding(TIME_WAVES, width)
        self.add_slots(width)
        self.blocks = nn.ModuleList(DiTBlock(f"blocks.{index}", params) for index in range(params.depth))
        self.norm = LayerNorm(width, EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch * params.raw_channels)
        self._initialise()
        grid = [side // patch for side in params.image_size]
        self.register_buffer("positions", position_embedding(width, *grid), persistent=False)

    def _initialise(self) -> None:
        """Xavier's uniform weights and no bias for linear maps and patches; std 0.02 for the embeddings of time and
        label; zero for what modulates and for the outputs."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if "modulation" not in name and not name.endswith("cross.out"):
                    nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.time.hidden, self.time.out, self.label):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        zero_module(self.modulation)
        zero_module(self.out)

    @property
    def attention_sites(self) -> tuple[str, ...]:
        """The names of the layers that call the attention seam, in their order: "blocks.0.self", "blocks.0.cross", …"""
        kinds = ("self", "cross") if self.params.context_channels else ("self",)
        return tuple(f"blocks.{index}.{kind}" for index in range(self.params.depth) for kind in kinds)

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition | None = None) -> Tensor:
        """Args:
            x: float [B, C, H, W], the noisy images or latents.
            network_time: float [B] (or one for all), the time in the network's units.
            condition: `label`, `vector`, `concat`, `context` (and `context_mask`) as the params require, and `attend`.

        Returns:
            The raw output, [B, raw_channels, H, W] in x's type.

        Raises:
            UserError: the size does not fit, or a slot of the condition is missing, unknown or out of range.
        """
        self.params.check_size(*x.shape[2:])
        h, condition = self.read(x, condition)  # [B, C + concat_channels, H, W]
        patches = self.patches(h.to(self.patches.weight.dtype))  # [B, D, H/p, W/p]
        size = tuple(patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2) + self._positions(size).to(patches)  # [B, L, D]
        embedding = self.embed(self.time(network_time.reshape(-1).expand(len(x))), condition)  # [B, D]
        embedding = F.silu(embedding)
        for block in self.blocks:
            enabled = self.params.checkpointing
            tokens = maybe_checkpoint(block, tokens, embedding, size, condition, enabled=enabled)  # [B, L, D]
        tokens = modulate(self.norm(tokens), *self.modulation(embedding).chunk(2, dim=1))  # [B, L, D]
        raw = self.out(tokens)  # [B, L, p·p·raw_channels]
        return self._image(raw, size).to(x.dtype)  # [B, raw_channels, H, W]

    def _positions(self, size: Sequence[int]) -> Tensor:
        patch = self.params.patch_size
        if tuple(side * patch for side in size) == tuple(self.params.image_size):
            return self.positions  # type: ignore[return-value]
        return position_embedding(self.params.width, *size)

    def _image(self, raw: Tensor, size: Sequence[int]) -> Tensor:
        """The patches [B, L, p·p·C] as an image [B, C, H, W]; a patch is counted by row, column, channel."""
        (rows, columns), patch = size, self.params.patch_size
        patches = raw.reshape(len(raw), rows, columns, patch, patch, -1)  # [B, H/p, W/p, p, p, C]
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(raw), -1, rows * patch, columns * patch)
