"""The U-Net of DDPM, Improved DDPM, ADM, ADM's up-samplers, latent diffusion and Stable Diffusion.

Papers: Ho 2020 (DDPM), Nichol & Dhariwal 2021 (Improved DDPM), Dhariwal & Nichol 2021 (ADM), Rombach et al. 2022
(latent diffusion: with `transformer_depth` and `context_channels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.networks.backbone import BackboneParams, Encoder, Level, Parts, TimeEmbedding, attention_sites
from carrara.networks.fused import norm_silu
from carrara.networks.layers import GroupNorm, Upsample, convolution, count_heads, zero_module
from carrara.networks.memory import to_memory_format
from carrara.networks.slots import ConditionedNetwork, ConditionedParams


@dataclass(frozen=True, kw_only=True)
class UNetParams(BackboneParams, ConditionedParams):
    """What the U-Net is made of: its encoder's `BackboneParams`, what conditions it, and the decoder's one choice.

    Attributes:
        up_heads: attention heads of the decoder, where they differ from `heads` (Improved DDPM).
    """

    up_heads: int | None = None

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "up_heads")
        self._needs("up_heads", "heads")
        for width in self.attended_widths[:-1]:
            count_heads(width, self.up_heads or self.heads, self.head_channels)


class UNet(ConditionedNetwork):
    """`raw = network(x, network_time, condition)`.

    The last convolution of every residual branch, and of the network, starts at zero.
    """

    params: UNetParams

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = params
        parts = Parts(params)
        self.time = TimeEmbedding(params.channels, params.embedding)
        self.add_slots(params.embedding)
        self.encoder = Encoder(params, params.in_channels + params.concat_channels)
        skips = list(self.encoder.skips)
        width = params.widths[-1]
        levels = []
        for level, out in reversed(list(enumerate(params.widths))):
            stages = []
            for index in range(params.blocks[level] + 1):
                stages.append(parts.stage(f"up.{level}.{index}", level, width + skips.pop(), out, params.up_heads))
                width = out
            levels.append(Level(stages, parts.resample(Upsample, width) if level else None))
        self.decoder = nn.ModuleList(levels)
        self.norm = GroupNorm(width, params.norm_groups)
        self.out = zero_module(convolution(params.dims, width, params.raw_channels))

    @property
    def attention_sites(self) -> tuple[str, ...]:
        """The names of the layers that call the attention seam, in their order: "down.1.0.self", "middle.self", …"""
        return attention_sites(self)

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
        embedding = self.embed(self.time(network_time.reshape(-1).expand(len(x))), condition)  # [B, 4·channels]
        embedding = F.silu(embedding)
        h = to_memory_format(h, self.params.channels)
        h, maps = self.encoder(h, embedding, condition)  # [B, C_n, H/2^n, W/2^n]
        for level in self.decoder:
            for stage in level.stages:  # type: ignore[union-attr]
                h = stage(torch.cat([h, maps.pop()], dim=1), embedding, condition)  # [B, C_i, H/2^i, W/2^i]
            if level.resample is not None:
                h = level.resample(h, embedding)  # type: ignore[operator]  # [B, C_i, H/2^(i-1), W/2^(i-1)]
        raw: Tensor = self.out(norm_silu(self.norm, h.to(self.out.weight.dtype)))  # [B, raw_channels, H, W]
        return raw.to(x.dtype).contiguous()
