"""Unconditional and class-conditional U-Nets in the layout of diffusers: folders of a `UNet2DModel`, in and out.

It is ADM's network under other names: what `DDPMPipeline` and `LDMPipeline` hold. (Google's first DDPM checkpoints are
of the same class, but count frequencies, pad and normalise otherwise: they are refused by the entry that says so.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.interop import diffusers_keys, heads
from carrara.interop.diffusers_folder import CONFIG, attention, read_json, read_weights, write_model
from carrara.interop.entries import check_entries
from carrara.interop.layout import Place, leaf, to_ours, to_theirs
from carrara.networks import UNet, UNetParams

CLASS = "UNet2DModel"

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}
"""What the config may leave out, of what we have too."""
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Entries of which our network has just these values, the first being the default."""
ASIDE = ("num_train_timesteps",)
"""Entries that change nothing for such networks."""

KINDS = {
    "DownBlock2D": ("conv", False),
    "AttnDownBlock2D": ("", True),
    "ResnetDownsampleBlock2D": ("resnet", False),
    "UpBlock2D": ("conv", False),
    "AttnUpBlock2D": ("", True),
    "ResnetUpsampleBlock2D": ("resnet", False),
}
"""(how the size changes, or "" where the config says it, and whether the level attends) by block type."""


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
    with torch.device("meta"):
        network = UNet(params)
    weights = to_ours(read_weights(folder), network, places(network))
    network.to_empty(device="cpu").load_state_dict(weights)
    return network.eval()


def save_unet(network: UNet, folder: str | Path) -> None:
    """Write the network as a folder that diffusers' `from_pretrained` reads.

    Raises:
        UserError: the network has something that diffusers does not know, or the disk is full.
    """
    write_model(Path(folder), config(network.params), unet_state_dict(network))


def unet_state_dict(network: UNet) -> dict[str, Tensor]:
    """The network's weights under diffusers' keys.

    Raises:
        UserError: the network has something that diffusers does not know.
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
    optional = {"sample_size": int, "attention_head_dim": int, "attn_norm_num_groups": int, "num_class_embeds": int}
    check_entries(config, DEFAULTS, optional=optional, per_level=("sample_size",))
    _check(config)
    c = {**DEFAULTS, **{name: value for name, value in config.items() if name in DEFAULTS}}
    widths, levels = c["block_out_channels"], len(c["block_out_channels"])
    down = [KINDS[name] for name in c["down_block_types"]]
    size = c["sample_size"] or 2 ** (levels - 1)
    same, twice = c["out_channels"] == c["in_channels"], c["out_channels"] == 2 * c["in_channels"]
    return UNetParams(
        image_size=tuple(size) if isinstance(size, list | tuple) else (size, size),
        in_channels=c["in_channels"],
        out_channels=None if same or twice else c["out_channels"],
        learned_variance=twice,
        channels=widths[0],
        channel_mult=tuple(w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths),
        blocks_per_level=c["layers_per_block"],
        attention=tuple(2**level for level, (_, attends) in enumerate(down) if attends),
        heads=1 if c["attention_head_dim"] is None else None,
        head_channels=c["attention_head_dim"],
        adaptive_norm=c["resnet_time_scale_shift"] == "scale_shift",
        resampling="residual" if _resampling(c) == "resnet" else "convolution",
        dropout=float(c["dropout"]),
        norm_groups=c["norm_num_groups"],
        num_classes=c["num_class_embeds"],
    )


def _resampling(c: Mapping[str, Any]) -> str:
    """How all levels change their size, "conv" or "resnet"; the lowest in resolution does not."""
    down, up = c["down_block_types"][:-1], c["up_block_types"][:-1]
    said = [KINDS[name][0] or c["downsample_type"] for name in down]
    said += [KINDS[name][0] or c["upsample_type"] for name in up]
    kinds = set(said) or {"conv"}
    if len(kinds) > 1 or not kinds <= {"conv", "resnet"}:
        raise UserError(
            f"the sizes change by {sorted(map(str, kinds))} at different levels:  'conv' or 'resnet' is possible."
        )
    return kinds.pop()


def _check(config: Mapping[str, Any]) -> None:
    if config.get("_class_name", CLASS) != CLASS:
        raise UserError(f"the config is a {config['_class_name']}'s: a {CLASS} is expected.")
    for name, values in FIXED.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"the U-Net's {name} = {config[name]} is not supported: only {values[0]} is.")
    for name in config:
        if not name.startswith("_") and name not in (*DEFAULTS, *FIXED, *ASIDE):
            raise UserError(f"the U-Net's config holds the unknown entry '{name}': it may be of a newer diffusers.")
    c = {**DEFAULTS, **config}
    for name in (*c["down_block_types"], *c["up_block_types"]):
        if name not in KINDS:
            raise UserError(f"a block of the type {name} is not supported: {', '.join(KINDS)} are.")
    down, up = [[KINDS[name][1] for name in c[f"{half}_block_types"]] for half in ("down", "up")]
    if down != up[::-1] or len(down) != len(c["block_out_channels"]):
        raise UserError("down_block_types, up_block_types and block_out_channels must agree level by level.")
    shift, groups = c["resnet_time_scale_shift"], c["attn_norm_num_groups"]
    if shift not in ("default", "scale_shift"):
        raise UserError(f"the U-Net's resnet_time_scale_shift = {shift} is not supported: default and scale_shift are.")
    if groups not in ({None, c["norm_num_groups"]} if shift == "default" else {c["norm_num_groups"]}):
        raise UserError(
            f"the U-Net's attn_norm_num_groups = {groups} is not supported here: {c['norm_num_groups']}, as of all its "
            "norms, is."
        )


def config(params: UNetParams) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `unet_params`.

    Raises:
        UserError: the network has something that diffusers does not know.
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
    unknown = None
    if any(params.depths):
        unknown = "transformers without text"
    elif params.dims != 2:
        unknown = f"networks of {params.dims} dimensions"
    elif params.resampling == "pooling":
        unknown = "resampling by 'pooling'"
    elif params.heads != 1 and heads.head_width(params) is None:
        unknown = "heads of varying width"
    elif params.up_heads is not None:
        unknown = "other heads in the decoder"
    elif len(set(params.blocks)) > 1:
        unknown = "blocks of varying number"
    elif any(width % params.norm_groups for width in params.widths):
        unknown = "group norms of varying groups"
    elif params.widths[0] != params.channels:
        unknown = "first level of another width than the first convolution's"
    elif params.concat_channels or params.vector_channels:
        unknown = "condition beside the class"
    if unknown:
        raise UserError(f"diffusers' {CLASS} knows no {unknown}, so this network cannot be written in its layout.")


# Keys


def places(network: UNet) -> Iterator[Place]:
    """Where every parameter lies in a diffusers state dict."""
    yield from diffusers_keys.backbone(network, attention)
    if network.label is not None:
        yield from leaf(network, "label", "class_embedding")
