"""The keys that diffusers' two U-Nets share: they differ in what attends, and in what they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from carrara.interop.diffusers_folder import SKIP
from carrara.interop.layout import Place, leaf, residual_block
from carrara.networks import UNet
from carrara.networks.backbone import Level, Stage
from carrara.networks.layers import ResidualBlock

Attention = Callable[[UNet, str, str], Iterator[Place]]
"""The places of an attention layer, by our name and theirs."""


def backbone(network: UNet, attention: Attention) -> Iterator[Place]:
    """Where the parameters of time, encoder, middle and decoder lie in a diffusers state dict."""
    yield from leaf(network, "time.hidden", "time_embedding.linear_1")
    yield from leaf(network, "time.out", "time_embedding.linear_2")
    yield from leaf(network, "encoder.stem", "conv_in")
    for half, blocks, change in (("encoder.levels", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        for number, level in enumerate(network.get_submodule(half).children()):
            assert isinstance(level, Level)
            yield from _level(
                network, level, f"{half}.{number}", f"{blocks}.{number}", f"{change}samplers.0", attention
            )
    yield from residual_block(network, "encoder.middle.block_in", "mid_block.resnets.0", SKIP)
    yield from attention(network, "encoder.middle.attention", "mid_block.attentions.0")
    yield from residual_block(network, "encoder.middle.block_out", "mid_block.resnets.1", SKIP)
    yield from leaf(network, "norm", "conv_norm_out")
    yield from leaf(network, "out", "conv_out")


def _level(network: UNet, level: Level, mine: str, theirs: str, resample: str, attention: Attention) -> Iterator[Place]:
    for index, stage in enumerate(level.stages):
        assert isinstance(stage, Stage)
        yield from residual_block(network, f"{mine}.stages.{index}.block", f"{theirs}.resnets.{index}", SKIP)
        if stage.attention is not None:
            yield from attention(network, f"{mine}.stages.{index}.attention", f"{theirs}.attentions.{index}")
    if isinstance(level.resample, ResidualBlock):
        yield from residual_block(network, f"{mine}.resample", f"{theirs}.{resample}", SKIP)
    elif level.resample is not None:
        yield from leaf(network, f"{mine}.resample.conv", f"{theirs}.{resample}.conv")
