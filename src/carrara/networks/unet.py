"""The U-Net of DDPM, Improved DDPM, ADM, ADM's up-samplers, latent diffusion and Stable Diffusion.

Papers: Ho 2020 (DDPM), Nichol & Dhariwal 2021 (Improved DDPM), Dhariwal & Nichol 2021 (ADM), Rombach et al. 2022
(latent diffusion: with `transformer_depth` and `context_channels`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks.backbone import BackboneParams, Encoder, Level, Parts, TimeEmbedding, attention_sites, check_slots
from carrara.networks.fused import norm_silu
from carrara.networks.layers import GroupNorm, Upsample, convolution, count_heads, zero_module
from carrara.networks.memory import to_memory_format
from carrara.networks.network import Network


@dataclass(frozen=True, kw_only=True)
class UNetParams(BackboneParams):
    """What the U-Net is made of, beside its encoder's `BackboneParams`.

    Attributes:
        out_channels: channels of one prediction; None: as many as `in_channels`.
        learned_variance: the output holds `out_channels` twice: prediction, then raw variance fraction.
        num_classes: the network is told a class, by an embedding of that many rows.
        label_tokens: 0 adds the class to the embedding of the time; n makes it the context instead, n tokens of
            `context_channels` (latent diffusion's class-conditional models have one).
        null_label: one row more, for "no class": the label `num_classes` (classifier-free guidance).
        vector_channels: width of `Condition.vector`, mapped onto the embedding.
        vector_layers: 1 is a linear map; 2 has a hidden layer with SiLU (Stable Diffusion's image embeddings).
        concat_channels: channels of `Condition.concat`, laid after those of x.
        upsample_concat: `Condition.concat` is smaller than x and is up-sampled bilinearly (super-resolution).
        up_heads: attention heads of the decoder, where they differ from `heads` (Improved DDPM).
    """

    out_channels: int | None = None
    learned_variance: bool = False
    num_classes: int | None = None
    label_tokens: int = 0
    null_label: bool = False
    vector_channels: int = 0
    vector_layers: int = 1
    concat_channels: int = 0
    upsample_concat: bool = False
    up_heads: int | None = None

    def _check(self) -> None:
        super()._check()
        for name in ("out_channels", "num_classes", "up_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"network.{name} is {value}: it must be at least 1.")
        for name in ("vector_channels", "concat_channels"):
            if getattr(self, name) < 0:
                raise UserError(f"network.{name} is {getattr(self, name)}: it must not be negative.")
        if self.vector_layers not in (1, 2):
            raise UserError(f"network.vector_layers is {self.vector_layers}: 1 and 2 are possible.")
        if self.null_label and self.num_classes is None:
            raise UserError("network.null_label needs network.num_classes.")
        if self.label_tokens < 0 or (self.label_tokens and not (self.num_classes and self.context_channels)):
            raise UserError("network.label_tokens needs network.num_classes and network.context_channels.")
        if self.upsample_concat and not (self.concat_channels and self.dims == 2):
            raise UserError("network.upsample_concat needs network.concat_channels and images.")
        if self.up_heads is not None and self.heads is None:
            raise UserError("network.up_heads needs network.heads.")
        for width in self.attended_widths[:-1]:
            count_heads(width, self.up_heads or self.heads, self.head_channels)

    @property
    def prediction_channels(self) -> int:
        """Channels of one prediction."""
        return self.out_channels or self.in_channels

    @property
    def raw_channels(self) -> int:
        """Channels of the output."""
        return self.prediction_channels * (2 if self.learned_variance else 1)

    @property
    def labels(self) -> int:
        """Rows of the label embedding, the null label's included; 0 where no class is told."""
        return 0 if self.num_classes is None else self.num_classes + self.null_label


class UNet(Network):
    """`raw = network(x, network_time, condition)`.

    The last convolution of every residual branch, and of the network, starts at zero.
    """

    params: UNetParams

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = params
        parts = Parts(params)
        self.time = TimeEmbedding(params.channels, params.embedding)
        told = params.label_tokens * params.context_channels or params.embedding
        self.label = nn.Embedding(params.labels, told) if params.labels else None
        self.vector = _vector_map(params) if params.vector_channels else None
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
    def takes(self) -> dict[str, int]:
        p = self.params
        context = 0 if p.label_tokens else p.context_channels
        return {"label": p.labels, "vector": p.vector_channels, "concat": p.concat_channels, "context": context}

    @property
    def learned_variance(self) -> bool:
        return self.params.learned_variance

    @property
    def attention_sites(self) -> tuple[str, ...]:
        """The layers that ask the attention seam, in the order they do: "down.1.0.self", "middle.self", …"""
        return attention_sites(self)

    @property
    def null_label(self) -> int:
        """The label that means "no class".

        Raises:
            UserError: the network was made without one.
        """
        if self.params.num_classes is None or not self.params.null_label:
            raise UserError("this network has no null label: train it with label dropout (network.null_label).")
        return self.params.num_classes

    def forward(self, x: Tensor, network_time: Tensor, condition: Condition | None = None) -> Tensor:
        """Args:
            x: float [B, C, H, W], the noisy images or latents.
            network_time: float [B] (or one for all), the time as the network was trained to be told it.
            condition: `label`, `vector`, `concat`, `context` (and `context_mask`) as the params say, and `attend`.

        Returns:
            The raw output, [B, raw_channels, H, W] in x's type.

        Raises:
            UserError: the size does not fit, or a slot of the condition is missing, unknown or out of range.
        """
        self.params.check_size(*x.shape[2:])
        condition = (condition or Condition()).batch(len(x))
        self._check(condition)
        if self.params.label_tokens and self.label is not None:
            tokens = self.label(condition.label).unflatten(1, (self.params.label_tokens, -1))
            condition = replace(condition, context=tokens)
        embedding = F.silu(self._embedding(network_time.reshape(-1).expand(len(x)), condition))
        h, maps = self.encoder(self._input(x, condition), embedding, condition)
        for level in self.decoder:
            for stage in level.stages:  # type: ignore[union-attr]
                h = stage(torch.cat([h, maps.pop()], dim=1), embedding, condition)
            if level.resample is not None:
                h = level.resample(h, embedding)  # type: ignore[operator]
        raw: Tensor = self.out(norm_silu(self.norm, h.to(self.out.weight.dtype)))
        return raw.to(x.dtype).contiguous()

    def _embedding(self, time: Tensor, condition: Condition) -> Tensor:
        embedding: Tensor = self.time(time)
        if self.label is not None and not self.params.label_tokens:
            embedding = embedding + self.label(condition.label)
        if self.vector is not None:
            embedding = embedding + self.vector(condition.vector)
        return embedding

    def _input(self, x: Tensor, condition: Condition) -> Tensor:
        if condition.concat is None:
            return to_memory_format(x, self.params.channels)
        beside = condition.concat.to(x.dtype)
        if self.params.upsample_concat:
            beside = F.interpolate(beside, x.shape[2:], mode="bilinear")
        elif beside.shape[2:] != x.shape[2:]:
            raise UserError(f"the condition's concat is of size {tuple(beside.shape[2:])}, x of {tuple(x.shape[2:])}.")
        return to_memory_format(torch.cat([x, beside], dim=1), self.params.channels)

    def _check(self, condition: Condition) -> None:
        p = self.params
        check_slots(condition, self.takes)
        if p.num_classes is not None and condition.label is not None:
            check_labels(condition.label, p.num_classes, p.null_label)


def _vector_map(params: UNetParams) -> nn.Linear | nn.Sequential:
    first = nn.Linear(params.vector_channels, params.embedding)
    if params.vector_layers == 1:
        return first
    return nn.Sequential(first, nn.SiLU(), nn.Linear(params.embedding, params.embedding))


def check_labels(label: Tensor, num_classes: int, null_label: bool) -> None:
    """Whether all labels can be looked up.

    Reading values would stall an accelerator: there, and in compiled code, the lookup itself must fail.

    Raises:
        UserError: a label is out of range.
    """
    if label.device.type != "cpu" or torch.compiler.is_compiling() or not label.numel():
        return
    wrong = label[(label < 0) | (label >= num_classes + null_label)]
    if wrong.numel():
        last = num_classes - 1
        null = f", or {num_classes} for no class" if null_label else " (it was trained without a null label)"
        raise UserError(f"label {int(wrong[0])} is out of range: this network knows 0..{last}{null}.")
