"""Where the layers of OpenAI's U-Nets, and of CompVis' which grew from them, lie in their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import nn

from carrara.interop.layout import Place, leaf
from carrara.networks import EncoderClassifier, UNet
from carrara.networks.backbone import Level, Stage
from carrara.networks.classifier import AdaptivePool, AttentionPool, SpatialPool
from carrara.networks.layers import Downsample, ResidualBlock, SelfAttention, Upsample
from carrara.networks.transformer import SpatialTransformer

Network = UNet | EncoderClassifier
Parts = tuple[tuple[str, str, int], ...]

TRANSFORMER_BLOCK = (
    ("norm_first", "norm1"),
    ("first.q", "attn1.to_q"),
    ("first.k", "attn1.to_k"),
    ("first.v", "attn1.to_v"),
    ("first.out", "attn1.to_out.0"),
    ("norm_cross", "norm2"),
    ("cross.q", "attn2.to_q"),
    ("cross.k", "attn2.to_k"),
    ("cross.v", "attn2.to_v"),
    ("cross.out", "attn2.to_out.0"),
    ("norm_feed", "norm3"),
    ("feed.hidden", "ff.net.0.proj"),
    ("feed.out", "ff.net.2"),
)
"""(our layer, theirs) within one transformer block, in CompVis' checkpoints and in those of diffusers."""


def places(network: Network) -> Iterator[Place]:
    """Where every parameter of the network lies in the originals' state dicts."""
    for theirs, mine in _layers(network):
        for part, name, axes in _parts(network.get_submodule(mine), network.params.projection):
            yield from leaf(network, ".".join(filter(None, (mine, part))), f"{theirs}.{name}".strip("."), axes=axes)
    if isinstance(network, EncoderClassifier) and isinstance(network.pool, AttentionPool):
        yield Place("pool.positions", ("out.2.positional_embedding",))


def _layers(network: Network) -> Iterator[tuple[str, str]]:
    """(their module, our module) for every layer."""
    yield "time_embed.0", "time.hidden"
    yield "time_embed.2", "time.out"
    yield "input_blocks.0.0", "encoder.stem"
    yield from _levels("input_blocks", 1, "encoder.levels", network.encoder.levels)
    for index, part in enumerate(("block_in", "attention", "block_out")):
        yield f"middle_block.{index}", f"encoder.middle.{part}"
    if isinstance(network, EncoderClassifier):
        yield "out", "pool"
        return
    if network.label is not None:
        yield "label_emb", "label"
    if network.vector is not None:
        yield "label_emb", "vector"
    yield from _levels("output_blocks", 0, "decoder", network.decoder)
    yield "out.0", "norm"
    yield "out.2", "out"


def _levels(theirs: str, start: int, mine: str, levels: nn.ModuleList) -> Iterator[tuple[str, str]]:
    """Their blocks are numbered through all levels. On the way down a change of size is a block of its own, on the
    way up it is the last layer of the level's last block."""
    block = start
    for number, level in enumerate(cast("Iterable[Level]", levels)):
        layers = 0
        for index, stage in enumerate(cast("Iterable[Stage]", level.stages)):
            layers = 1 if stage.attention is None else 2
            for layer, part in enumerate(("block", "attention")[:layers]):
                yield f"{theirs}.{block}.{layer}", f"{mine}.{number}.stages.{index}.{part}"
            block += 1
        if level.resample is not None:
            down = theirs == "input_blocks"
            yield f"{theirs}.{block}.0" if down else f"{theirs}.{block - 1}.{layers}", f"{mine}.{number}.resample"
            block += down


def _parts(module: nn.Module, projection: str) -> Parts:
    """(our name, their name, axes) for what is inside a layer; names are empty for the layer itself."""
    if isinstance(module, ResidualBlock):
        return (
            ("norm_in", "in_layers.0", 0),
            ("conv_in", "in_layers.2", 0),
            ("embed", "emb_layers.1", 0),
            ("norm_out", "out_layers.0", 0),
            ("conv_out", "out_layers.3", 0),
            ("skip", "skip_connection", 0),
        )
    if isinstance(module, SelfAttention):
        return ("norm", "norm", 0), ("qkv", "qkv", 3), ("out", "proj_out", 3)
    if isinstance(module, SpatialTransformer):
        return _transformer_parts(module, 4 if projection == "convolution" else 0)
    if isinstance(module, nn.Sequential):  # the vector's two layers
        return ("0", "0.0", 0), ("2", "0.2", 0)
    if isinstance(module, Downsample):
        return () if module.conv is None else (("conv", "op", 0),)
    if isinstance(module, Upsample):
        return () if module.conv is None else (("conv", "conv", 0),)
    if isinstance(module, AttentionPool):
        return ("norm", "0", 0), ("qkv", "2.qkv_proj", 3), ("out", "2.c_proj", 3)
    if isinstance(module, AdaptivePool):
        return ("norm", "0", 0), ("out", "3", 4)
    if isinstance(module, SpatialPool):
        hidden = ("hidden", "0", 0)
        return (hidden, ("out", "2", 0)) if module.norm is None else (hidden, ("norm", "1", 0), ("out", "3", 0))
    return (("", "", 0),)


def _transformer_parts(transformer: SpatialTransformer, axes: int) -> Parts:
    """The layers of a latent diffusion transformer; `axes` is what its projections' weights have."""
    ends = ("norm", "norm", 0), ("project_in", "proj_in", axes), ("project_out", "proj_out", axes)
    blocks = [
        (f"blocks.{index}.{mine}", f"transformer_blocks.{index}.{theirs}", 0)
        for index in range(len(transformer.blocks))
        for mine, theirs in TRANSFORMER_BLOCK
    ]
    return *ends, *blocks
