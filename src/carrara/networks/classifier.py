"""ADM's noisy classifier: p(y | x_t, t) (Dhariwal & Nichol 2021, section 4 and appendix H)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks.backbone import BackboneParams, Encoder, TimeEmbedding
from carrara.networks.layers import GroupNorm, attention, count_heads, split_heads, zero_module
from carrara.networks.memory import to_memory_format
from carrara.networks.network import Network
from carrara.networks.params import times
from carrara.networks.slots import check_slots


@dataclass(frozen=True, kw_only=True)
class EncoderClassifierParams(BackboneParams):
    """What the classifier is made of, in addition to its encoder's `BackboneParams`.

    Attributes:
        num_classes: how many classes.
        pool: how the maps become one vector. "attention": attention pooling of the last map, at the size
            trained for only; "adaptive": its mean; "spatial": the means of all maps through a hidden layer of
            2048; "spatial_v2": the same, with a group norm and SiLU.
    """

    num_classes: int = 10
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"

    def _check(self) -> None:
        super()._check()
        self._only_images("image_size", "of a classifier is for")
        self._at_least(1, "num_classes")
        sentence = "is for networks with a context, a classifier takes none: leave it out."
        self._require(not self.context_channels, "context_channels", sentence, "unsupported")
        self._one_of("pool", ("attention", "adaptive", "spatial", "spatial_v2"))

    def check_size(self, *size: int) -> None:
        super().check_size(*size)
        if self.pool == "attention" and size != tuple(self.image_size):
            raise UserError(
                f"this classifier reads images of {times(self.image_size)}, not of {times(size)}: "
                "its attention pool has an embedding for each position of that size only.",
                key="network.image_size",
                code="shape",
            )


class AttentionPool(nn.Module):
    """One attention over [mean; positions] + embeddings, whose output is that of the first token (as in CLIP)."""

    def __init__(self, channels: int, count: int, heads: int, out: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels, groups)
        self.positions = nn.Parameter(torch.randn(channels, count + 1) / math.sqrt(channels))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out)

    def forward(self, maps: list[Tensor], condition: Condition) -> Tensor:
        """Maps [B, C_i, H_i, W_i], from fine to coarse, to logits [B, K]."""
        tokens = F.silu(self.norm(maps[-1])).flatten(2).transpose(1, 2)  # [B, N, C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positions.T  # [B, 1 + N, C]
        q, k, v = split_heads(self.qkv(tokens), self.heads, "new")  # [B, heads, 1 + N, d]
        size = maps[-1].shape[2:]
        first = attention(q[:, :, :1], k, v, condition, name="pool", kind="self", size=size)  # [B, heads, 1, d]
        return self.out(first.flatten(1))  # type: ignore[no-any-return]  # [B, K]


class AdaptivePool(nn.Module):
    """The mean over the positions of the last map, then a linear map that starts at zero."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.out = zero_module(nn.Linear(channels, out))

    def forward(self, maps: list[Tensor], condition: Condition) -> Tensor:
        """Maps [B, C_i, H_i, W_i], from fine to coarse, to logits [B, K]."""
        return self.out(F.silu(self.norm(maps[-1])).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class SpatialPool(nn.Module):
    """The means of every map through one hidden layer of 2048, with ReLU, or with group norm and SiLU."""

    def __init__(self, channels: int, out: int, normed: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 2048)
        self.norm = GroupNorm(2048) if normed else None
        self.out = nn.Linear(2048, out)

    def forward(self, maps: list[Tensor], condition: Condition) -> Tensor:
        """Maps [B, C_i, H_i, W_i], from fine to coarse, to logits [B, K]."""
        h = self.hidden(torch.cat([h.mean(dim=(2, 3)) for h in maps], dim=1))  # [B, 2048]
        h = F.relu(h) if self.norm is None else F.silu(self.norm(h))
        return self.out(h)  # type: ignore[no-any-return]  # [B, K]


class EncoderClassifier(Network):
    """The encoder half of ADM's U-Net and a pool: `logits = classifier(x, network_time)`."""

    params: EncoderClassifierParams

    def __init__(self, params: EncoderClassifierParams) -> None:
        super().__init__()
        self.params = params
        self.time = TimeEmbedding(params.channels, params.embedding)
        self.encoder = Encoder(params, params.in_channels)
        self.pool = self._pool()

    def _pool(self) -> AttentionPool | AdaptivePool | SpatialPool:
        p = self.params
        width = p.widths[-1]
        if p.pool == "attention":
            count = math.prod(side // p.factors[-1] for side in p.image_size)
            heads = count_heads(width, p.heads, p.head_channels)
            return AttentionPool(width, count, heads, p.num_classes, p.norm_groups)
        if p.pool == "adaptive":
            return AdaptivePool(width, p.num_classes, p.norm_groups)
        return SpatialPool(sum(self.encoder.skips) + width, p.num_classes, normed=p.pool == "spatial_v2")

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition | None = None) -> Tensor:
        """Args:
            x: float [B, C, H, W], the noisy images.
            network_time: float [B] (or one for all), the time in the network's units.
            condition: may hold the attention seam; a classifier takes nothing else.

        Returns:
            float [B, num_classes], logits in x's type.

        Raises:
            UserError: the size does not fit, or a slot of the condition is filled.
        """
        self.params.check_size(*x.shape[2:])
        condition = condition or Condition()
        check_slots(condition, {})
        embedding = F.silu(self.time(network_time.reshape(-1).expand(len(x))))  # [B, 4·channels]
        h = to_memory_format(x, self.params.channels)  # [B, C, H, W]
        h, maps = self.encoder(h, embedding, condition)  # [B, C_n, H/2^n, W/2^n]
        logits: Tensor = self.pool([m.to(embedding.dtype) for m in (*maps, h)], condition)  # [B, K]
        return logits.to(x.dtype)
