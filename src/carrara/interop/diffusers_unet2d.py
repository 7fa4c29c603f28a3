"""Unconditional and class-conditional U-Nets in the layout of diffusers: folders of a `UNet2DModel`, in and out.

It is ADM's network under other names: what `DDPMPipeline` and `LDMPipeline` hold. (Google's first DDPM checkpoints are
of the same class, but count frequencies, pad and normalise otherwise: they are refused by that entry.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from carrara.entries import IGNORED, Entry, fixed, read_entries
from carrara.errors import UserError
from carrara.interop import heads
from carrara.interop.diffusers_folder import CONFIG, read_json, read_weights, write_model
from carrara.interop.diffusers_unet import SHARED, check_blocks
from carrara.interop.layout import check_expressible, filled, to_theirs
from carrara.interop.unet_keys import diffusers_places as places
from carrara.interop.unet_keys import multiples
from carrara.networks import UNet, UNetParams

CLASS = "UNet2DModel"

ENTRIES = SHARED | {
    "_class_name": fixed(CLASS),
    "in_channels": Entry(int, 3),
    "out_channels": Entry(int, 3),
    "down_block_types": Entry(tuple[str, ...], ("DownBlock2D", *["AttnDownBlock2D"] * 3)),
    "up_block_types": Entry(tuple[str, ...], (*["AttnUpBlock2D"] * 3, "UpBlock2D")),
    "block_out_channels": Entry(tuple[int, ...], (224, 448, 672, 896)),
    "layers_per_block": Entry(int, 2),
    "downsample_type": fixed("conv", "resnet"),
    "upsample_type": fixed("conv", "resnet"),
    "attention_head_dim": Entry(int | None, 8),
    "attn_norm_num_groups": Entry(int | None, None),
    "mid_block_type": fixed("UNetMidBlock2D"),
    "add_attention": fixed(True),
    "class_embed_type": fixed(None),
    "num_train_timesteps": IGNORED,
}
"""The entries of `config.json`, with diffusers' defaults."""

KINDS = {
    "DownBlock2D": ("conv", False),
    "AttnDownBlock2D": ("", True),
    "ResnetDownsampleBlock2D": ("resnet", False),
    "UpBlock2D": ("conv", False),
    "AttnUpBlock2D": ("", True),
    "ResnetUpsampleBlock2D": ("resnet", False),
}
"""(how the size changes, or "" where another entry has it, and whether the level attends) by block type."""


# Folders


def load_unet(folder: str | Path, *, null_label: bool = False) -> UNet:
    """The U-Net in a folder that diffusers wrote, in float32.

    Args:
        folder: holds `config.json` and the weights.
        null_label: the last class means "no class".

    Raises:
        UserError: a file is missing or damaged, the config has what we do not, or the weights do not fit it.
    """
    folder = Path(folder)
    params = unet_params(read_json(folder / CONFIG, "U-Net"))
    if null_label and params.num_classes is not None:
        params = replace(params, num_classes=params.num_classes - 1, null_label=True)
    return filled(lambda: UNet(params), read_weights(folder), places)


def save_unet(network: UNet, folder: str | Path) -> None:
    """Write the network as a folder that diffusers' `from_pretrained` reads.

    Raises:
        UserError: the network has something that diffusers does not have, or the disk is full.
    """
    write_model(Path(folder), config(network.params), unet_state_dict(network))


def unet_state_dict(network: UNet) -> dict[str, Tensor]:
    """The network's weights under diffusers' keys.

    Raises:
        UserError: the network has something that diffusers does not have.
    """
    config(network.params)
    network = heads.in_new_order(network)
    return to_theirs(network, places(network))


# Configs


def unet_params(config: Mapping[str, Any]) -> UNetParams:
    """A `config.json` as our params.

    Raises:
        UserError: an entry has a value that our network does not have, or is unknown.
    """
    c = read_entries(config, ENTRIES, CONFIG)
    attends = check_blocks(c, {name: yes for name, (_, yes) in KINDS.items()})
    adaptive = c["resnet_time_scale_shift"] == "scale_shift"
    groups, known = c["attn_norm_num_groups"], {c["norm_num_groups"]} | ({None} if not adaptive else set())
    if groups not in known:
        raise UserError(
            f"attn_norm_num_groups = {groups} is not supported here: {c['norm_num_groups']}, as of all norms, is.",
            key="attn_norm_num_groups",
            code="unsupported",
        )
    widths, levels = c["block_out_channels"], len(c["block_out_channels"])
    size = c["sample_size"] or 2 ** (levels - 1)
    same, twice = c["out_channels"] == c["in_channels"], c["out_channels"] == 2 * c["in_channels"]
    return UNetParams(
        image_size=size if isinstance(size, tuple) else (size, size),
        in_channels=c["in_channels"],
        out_channels=None if same or twice else c["out_channels"],
        learned_variance=twice,
        channels=widths[0],
        channel_mult=multiples(widths),
        blocks_per_level=c["layers_per_block"],
        attention=tuple(2**level for level, yes in enumerate(attends) if yes),
        heads=1 if c["attention_head_dim"] is None else None,
        head_channels=c["attention_head_dim"],
        adaptive_norm=adaptive,
        resampling="residual" if _resampling(c) == "resnet" else "convolution",
        dropout=float(c["dropout"]),
        norm_groups=c["norm_num_groups"],
        num_classes=c["num_class_embeds"],
    )


def _resampling(c: Mapping[str, Any]) -> str:
    """How all levels change their size, "conv" or "resnet"; the lowest in resolution does not."""
    halves = (("down_block_types", "downsample_type"), ("up_block_types", "upsample_type"))
    kinds = {KINDS[name][0] or c[default] for half, default in halves for name in c[half][:-1]} or {"conv"}
    if len(kinds) > 1:
        raise UserError(
            "the sizes change by convolutions at some levels and by residual blocks at others.",
            key="down_block_types",
            code="unsupported",
        )
    return str(kinds.pop())


def config(params: UNetParams) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `unet_params`.

    Raises:
        UserError: the network has something that diffusers does not have.
    """
    _check_exportable(params)
    residual = params.resampling == "residual"
    attends = [factor in params.attention for factor in params.factors]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    kind = "resnet" if residual else "conv"
    height, width = params.image_size
    return {
        "_class_name": CLASS,
        "sample_size": height if height == width else [height, width],
        "in_channels": params.in_channels,
        "out_channels": params.raw_channels,
        "down_block_types": ["AttnDownBlock2D" if yes else plain[0] for yes in attends],
        "up_block_types": ["AttnUpBlock2D" if yes else plain[1] for yes in reversed(attends)],
        "block_out_channels": list(params.widths),
        "layers_per_block": params.blocks[0],
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": params.dropout,
        "attention_head_dim": None if params.heads == 1 else heads.head_width(params),
        "norm_num_groups": params.norm_groups,
        "attn_norm_num_groups": params.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if params.adaptive_norm else "default",
        "num_class_embeds": params.labels or None,
    }


def _check_exportable(params: UNetParams) -> None:
    """Raises UserError unless diffusers can build the network."""
    p = params
    varying = p.heads != 1 and heads.head_width(p) is None
    check_expressible(
        f"diffusers' {CLASS}",
        (
            ("network.transformer_depth", any(p.depths), "transformers without text"),
            ("network.image_size", p.dims != 2, f"networks of {p.dims} dimensions"),
            ("network.resampling", p.resampling == "pooling", "resampling by 'pooling'"),
            ("network.heads", varying, "heads of varying width"),
            ("network.up_heads", p.up_heads is not None, "other heads in the decoder"),
            ("network.blocks_per_level", len(set(p.blocks)) > 1, "blocks of varying number"),
            ("network.norm_groups", any(w % p.norm_groups for w in p.widths), "group norms of varying groups"),
            ("network.channel_mult", p.widths[0] != p.channels, "first level of another width than the first layer's"),
            ("network.concat_channels", bool(p.concat_channels or p.vector_channels), "condition other than the class"),
        ),
    )
