"""The names of layers in the checkpoints of OpenAI's U-Nets, of CompVis' which grew from them, and of diffusers'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from torch import nn

from carrara.interop import layout
from carrara.interop.layout import Place, Table
from carrara.networks import EncoderClassifier, UNet
from carrara.networks.backbone import Level, Stage
from carrara.networks.classifier import AdaptivePool, AttentionPool, SpatialPool
from carrara.networks.layers import Downsample, ResidualBlock, SelfAttention, Upsample
from carrara.networks.transformer import SpatialTransformer, TransformerBlock

Network = UNet | EncoderClassifier

TRANSFORMER_BLOCK = {
    "norm_first": "norm1",
    "first.q": "attn1.to_q",
    "first.k": "attn1.to_k",
    "first.v": "attn1.to_v",
    "first.out": "attn1.to_out.0",
    "norm_cross": "norm2",
    "cross.q": "attn2.to_q",
    "cross.k": "attn2.to_k",
    "cross.v": "attn2.to_v",
    "cross.out": "attn2.to_out.0",
    "norm_feed": "norm3",
    "feed.hidden": "ff.net.0.proj",
    "feed.out": "ff.net.2",
}
"""Within one transformer block, in CompVis' checkpoints and in those of diffusers."""


def _transformer(network: Network) -> Table:
    """A spatial transformer, whose projections are 1×1 convolutions in some checkpoints."""
    axes = 4 if network.params.projection == "convolution" else 0
    return {
        SpatialTransformer: {
            "norm": "norm",
            "project_in": ("proj_in", axes),
            "project_out": ("proj_out", axes),
            "blocks.{i}": "transformer_blocks.{i}",
        },
        TransformerBlock: TRANSFORMER_BLOCK,
    }


# OpenAI and CompVis

OPENAI: Table = {
    ResidualBlock: {
        "norm_in": "in_layers.0",
        "conv_in": "in_layers.2",
        "embed": "emb_layers.1",
        "norm_out": "out_layers.0",
        "conv_out": "out_layers.3",
        "skip": "skip_connection",
    },
    SelfAttention: {"norm": "norm", "qkv": ("qkv", 3), "out": ("proj_out", 3)},
    Downsample: {"conv": "op"},
    Upsample: {"conv": "conv"},
    AttentionPool: {
        "norm": "0",
        "positions": "2.positional_embedding",
        "qkv": ("2.qkv_proj", 3),
        "out": ("2.c_proj", 3),
    },
    AdaptivePool: {"norm": "0", "out": ("3", 4)},
}


def places(network: Network) -> Iterator[Place]:
    """Where every parameter of the network lies in the originals' state dicts."""
    pool = network.pool if isinstance(network, EncoderClassifier) else None
    last = "2" if isinstance(pool, SpatialPool) and pool.norm is None else "3"
    return layout.places(
        network,
        {
            **OPENAI,
            **_transformer(network),
            SpatialPool: {"hidden": "0", "norm": "1", "out": last},
            type(network): dict(_layers(network)),
        },
    )


def _layers(network: Network) -> Iterator[tuple[str, str]]:
    """(our module, their module) for every layer."""
    yield "time.hidden", "time_embed.0"
    yield "time.out", "time_embed.2"
    yield "encoder.stem", "input_blocks.0.0"
    yield from _levels("encoder.levels", network.encoder.levels, "input_blocks", 1)
    for index, part in enumerate(("block_in", "attention", "block_out")):
        yield f"encoder.middle.{part}", f"middle_block.{index}"
    if isinstance(network, EncoderClassifier):
        yield "pool", "out"
        return
    yield "label", "label_emb"
    yield "vector", "label_emb.0" if network.params.vector_layers == 2 else "label_emb"
    yield from _levels("decoder", network.decoder, "output_blocks", 0)
    yield "norm", "out.0"
    yield "out", "out.2"


def _levels(mine: str, levels: nn.ModuleList, theirs: str, block: int) -> Iterator[tuple[str, str]]:
    """Their blocks are numbered through all levels. On the way down a change of size is a block of its own, on the
    way up it is the last layer of the level's last block."""
    for number, level in enumerate(cast("Iterable[Level]", levels)):
        layers = 0
        for index, stage in enumerate(cast("Iterable[Stage]", level.stages)):
            layers = 1 if stage.attention is None else 2
            for layer, part in enumerate(("block", "attention")[:layers]):
                yield f"{mine}.{number}.stages.{index}.{part}", f"{theirs}.{block}.{layer}"
            block += 1
        if level.resample is not None:
            down = theirs == "input_blocks"
            yield f"{mine}.{number}.resample", f"{theirs}.{block}.0" if down else f"{theirs}.{block - 1}.{layers}"
            block += down


# diffusers

RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embed": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}
"""Within a residual block of diffusers, and but for the last of CompVis' first stages."""
DIFFUSERS: Table = {
    ResidualBlock: RESIDUAL,
    SelfAttention: {"norm": "group_norm", "qkv": ("to_q to_k to_v", 2), "out": ("to_out.0", 2)},
    Downsample: {"conv": "conv"},
    Upsample: {"conv": "conv"},
    UNet: {
        "time.hidden": "time_embedding.linear_1",
        "time.out": "time_embedding.linear_2",
        "encoder.stem": "conv_in",
        "encoder.levels.{i}.stages.{j}.block": "down_blocks.{i}.resnets.{j}",
        "encoder.levels.{i}.stages.{j}.attention": "down_blocks.{i}.attentions.{j}",
        "encoder.levels.{i}.resample": "down_blocks.{i}.downsamplers.0",
        "encoder.middle.block_in": "mid_block.resnets.0",
        "encoder.middle.attention": "mid_block.attentions.0",
        "encoder.middle.block_out": "mid_block.resnets.1",
        "decoder.{i}.stages.{j}.block": "up_blocks.{i}.resnets.{j}",
        "decoder.{i}.stages.{j}.attention": "up_blocks.{i}.attentions.{j}",
        "decoder.{i}.resample": "up_blocks.{i}.upsamplers.0",
        "norm": "conv_norm_out",
        "out": "conv_out",
        "label": "class_embedding",
        "vector": "class_embedding",  # one layer
        "vector.0": "class_embedding.linear_1",
        "vector.2": "class_embedding.linear_2",
    },
}


def diffusers_places(network: UNet) -> Iterator[Place]:
    """Where every parameter of the network lies in a state dict of diffusers' U-Nets."""
    table = {**DIFFUSERS, **_transformer(network)}
    if network.params.vector_layers == 2:
        table[UNet] = {mine: theirs for mine, theirs in DIFFUSERS[UNet].items() if mine != "vector"}
    return layout.places(network, table)


def multiples(widths: Sequence[int]) -> tuple[float, ...]:
    """The widths of a network's levels in units of the first; whole where they are."""
    first = widths[0]
    return tuple(width // first if width % first == 0 else width / first for width in widths)
