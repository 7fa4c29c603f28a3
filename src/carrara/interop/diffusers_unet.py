"""U-Nets in the layout of diffusers: folders of a `UNet2DConditionModel`, in and out.

A folder holds `config.json` and the weights, `diffusion_pytorch_model.safetensors` (or an older `.bin`). The network
is latent diffusion's (see `carrara.interop.compvis_unet`) under other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from carrara.entries import IGNORED, Entry, fixed, read_entries
from carrara.errors import UserError, nearest
from carrara.interop.diffusers_folder import CONFIG, read_json, read_weights, write_model
from carrara.interop.layout import check_expressible, filled, to_theirs
from carrara.interop.unet_keys import diffusers_places as places
from carrara.interop.unet_keys import multiples
from carrara.networks import UNet, UNetParams

CLASS = "UNet2DConditionModel"

SHARED = {
    "_diffusers_version": IGNORED,
    "_name_or_path": IGNORED,
    "sample_size": Entry(int | tuple[int, int] | None, None),
    "block_out_channels": Entry(tuple[int, ...], (320, 640, 1280, 1280)),
    "dropout": Entry(float, 0.0),
    "norm_num_groups": Entry(int, 32),
    "num_class_embeds": Entry(int | None, None),
    "resnet_time_scale_shift": fixed("default", "scale_shift"),
    "center_input_sample": fixed(False),
    "flip_sin_to_cos": fixed(True),
    "freq_shift": fixed(0),
    "downsample_padding": fixed(1),
    "mid_block_scale_factor": fixed(1),
    "act_fn": fixed("silu", "swish"),
    "norm_eps": fixed(1e-5),
    "time_embedding_type": fixed("positional"),
    "time_embedding_dim": fixed(None),
}
"""The entries of `config.json` that both U-Nets of diffusers have, with diffusers' defaults."""
ENTRIES = SHARED | {
    "_class_name": fixed(CLASS),
    "in_channels": Entry(int, 4),
    "out_channels": Entry(int, 4),
    "down_block_types": Entry(tuple[str, ...], ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)),
    "up_block_types": Entry(tuple[str, ...], ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
    "only_cross_attention": Entry(bool | tuple[bool, ...], False),
    "layers_per_block": Entry(int | tuple[int, ...], 2),
    "cross_attention_dim": Entry(int | tuple[int, ...], 1280),
    "transformer_layers_per_block": Entry(int | tuple[int, ...], 1),
    "attention_head_dim": Entry(int | tuple[int, ...], 8),
    "use_linear_projection": Entry(bool, False),
    "class_embed_type": fixed(None, "projection", "simple_projection"),
    "projection_class_embeddings_input_dim": Entry(int | None, None),
    "mid_block_type": fixed("UNetMidBlock2DCrossAttn"),
    "num_attention_heads": fixed(None),
    "reverse_transformer_layers_per_block": fixed(None),
    "encoder_hid_dim": fixed(None),
    "encoder_hid_dim_type": fixed(None),
    "dual_cross_attention": fixed(False),
    "addition_embed_type": fixed(None),
    "resnet_skip_time_act": fixed(False),
    "resnet_out_scale_factor": fixed(1),
    "time_embedding_act_fn": fixed(None),
    "timestep_post_act": fixed(None),
    "time_cond_proj_dim": fixed(None),
    "conv_in_kernel": fixed(3),
    "conv_out_kernel": fixed(3),
    "attention_type": fixed("default"),
    "class_embeddings_concat": fixed(False),
    "cross_attention_norm": fixed(None),
    "upcast_attention": IGNORED,  # a kernel's precision
    "addition_time_embed_dim": IGNORED,  # of an embedding that these networks lack
    "addition_embed_type_num_heads": IGNORED,
    "mid_block_only_cross_attention": IGNORED,
}
BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True, "UpBlock2D": False, "CrossAttnUpBlock2D": True}
"""Whether a block of a type attends."""


# Folders


def load_unet(folder: str | Path, *, concat_channels: int = 0) -> UNet:
    """The U-Net in a folder that diffusers wrote, in float32.

    Args:
        folder: holds `config.json` and the weights.
        concat_channels: how many of `in_channels` come from `Condition.concat`.

    Raises:
        UserError: a file is missing or damaged, the config has what we do not, or the weights do not fit it.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "U-Net")
    return from_state_dict(read_weights(folder), unet_params(config, concat_channels=concat_channels))


def save_unet(network: UNet, folder: str | Path) -> None:
    """Write the network as a folder that diffusers' `from_pretrained` reads.

    Raises:
        UserError: the network has something that diffusers does not have, or the disk is full.
    """
    described = config(network.params)
    write_model(Path(folder), described, unet_state_dict(network))


def from_state_dict(state_dict: Mapping[str, Tensor], params: UNetParams) -> UNet:
    """A network of these params with the weights of a diffusers state dict.

    Raises:
        UserError: a key is missing, unexpected or of another shape; the first one is named.
    """
    return filled(lambda: UNet(params), state_dict, places)


def unet_state_dict(network: UNet) -> dict[str, Tensor]:
    """The network's weights under diffusers' keys.

    Raises:
        UserError: the network has something that diffusers does not have.
    """
    config(network.params)
    return to_theirs(network, places(network))


# Configs


def unet_params(config: Mapping[str, Any], *, concat_channels: int = 0) -> UNetParams:
    """A `config.json` as our params.

    Raises:
        UserError: an entry has a value that Stable Diffusion's networks do not have, or is unknown.
    """
    c = read_entries(config, ENTRIES, CONFIG)
    attends = check_blocks(c, BLOCKS)
    widths, levels = c["block_out_channels"], len(c["block_out_channels"])
    factors = [2**level for level in range(levels)]
    only = _each("only_cross_attention", c["only_cross_attention"], levels)
    heads, head_channels = _heads(_each("attention_head_dim", c["attention_head_dim"], levels), widths)
    size = c["sample_size"] or 2 ** (levels - 1)
    out = c["out_channels"]
    in_channels = c["in_channels"] - concat_channels
    if in_channels < 1:
        raise UserError(
            f"concat_channels = {concat_channels} of in_channels = {c['in_channels']} leave no x.",
            key="concat_channels",
        )
    return UNetParams(
        image_size=size if isinstance(size, tuple) else (size, size),
        in_channels=in_channels,
        concat_channels=concat_channels,
        out_channels=None if out == in_channels else out,
        channels=widths[0],
        channel_mult=multiples(widths),
        blocks_per_level=c["layers_per_block"],
        attention=tuple(factor for factor, yes in zip(factors, attends, strict=True) if yes),
        heads=heads,
        head_channels=head_channels,
        qkv_order="legacy",
        adaptive_norm=c["resnet_time_scale_shift"] == "scale_shift",
        resampling="convolution",
        dropout=float(c["dropout"]),
        transformer_depth=c["transformer_layers_per_block"],
        context_channels=_context(c["cross_attention_dim"]),
        context_only=tuple(factor for factor, yes in zip(factors, only, strict=True) if yes),
        projection="linear" if c["use_linear_projection"] else "convolution",
        norm_groups=c["norm_num_groups"],
        **_conditions(c),
    )


def config(params: UNetParams) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `unet_params`.

    `in_channels` hold `concat_channels` too.

    Raises:
        UserError: the network has something that diffusers does not have.
    """
    _check_exportable(params)
    attends = [factor in params.attention for factor in params.factors]
    widths = params.widths
    heads = [params.heads or width // (params.head_channels or width) for width in widths]
    conditions: dict[str, Any] = {"num_class_embeds": params.labels or None}
    if params.vector_channels:
        conditions["class_embed_type"] = "projection" if params.vector_layers == 2 else "simple_projection"
        conditions["projection_class_embeddings_input_dim"] = params.vector_channels
    height, width = params.image_size
    return {
        "_class_name": CLASS,
        "sample_size": height if height == width else [height, width],
        "in_channels": params.in_channels + params.concat_channels,
        "out_channels": params.raw_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "only_cross_attention": [factor in params.context_only for factor in params.factors],
        "block_out_channels": list(widths),
        "layers_per_block": list(params.blocks),
        "dropout": params.dropout,
        "norm_num_groups": params.norm_groups,
        "cross_attention_dim": params.context_channels,
        "transformer_layers_per_block": list(params.depths),
        "attention_head_dim": heads,
        "use_linear_projection": params.projection == "linear",
        "resnet_time_scale_shift": "scale_shift" if params.adaptive_norm else "default",
        **conditions,
    }


def check_blocks(c: Mapping[str, Any], known: Mapping[str, bool]) -> tuple[bool, ...]:
    """Whether each level attends, down from the highest resolution.

    Args:
        c: the entries of a config.
        known: the types of blocks, and whether each attends.

    Raises:
        UserError: a type is unknown, or down_block_types, up_block_types and block_out_channels do not agree.
    """
    for half in ("down_block_types", "up_block_types"):
        for kind in c[half]:
            if kind not in known:
                raise UserError(f"{half} has '{kind}': {nearest(kind, known)}", key=half, code="unsupported")
    down, up = (tuple(known[kind] for kind in c[half]) for half in ("down_block_types", "up_block_types"))
    if down != up[::-1] or len(down) != len(c["block_out_channels"]):
        raise UserError(
            "down_block_types, up_block_types and block_out_channels must agree level by level.",
            key="up_block_types",
            code="mismatch",
        )
    return down


def _conditions(c: Mapping[str, Any]) -> dict[str, Any]:
    if c["class_embed_type"] is None:
        return {"num_classes": c["num_class_embeds"]}
    layers = 2 if c["class_embed_type"] == "projection" else 1
    return {"vector_channels": c["projection_class_embeddings_input_dim"] or 0, "vector_layers": layers}


def _heads(counts: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int | None, int | None]:
    """The heads of all levels as one number, or as one width. (`attention_head_dim` is the number of heads.)"""
    if len(set(counts)) == 1:
        return counts[0], None
    each = {width // count for width, count in zip(widths, counts, strict=True)}
    if len(each) > 1:
        raise UserError(
            f"attention_head_dim {list(counts)} gives heads neither of one number nor of one width.",
            key="attention_head_dim",
            code="unsupported",
        )
    return None, each.pop()


def _each(name: str, value: Any, levels: int) -> tuple[Any, ...]:
    """The values of all levels, of an entry that may be one for all."""
    values = value if isinstance(value, tuple) else (value,) * levels
    if len(values) != levels:
        raise UserError(f"{name} has {len(values)} entries for {levels} levels.", key=name, code="mismatch")
    return values


def _context(value: int | tuple[int, ...]) -> int:
    """The one width of the context, which a config may repeat for each level."""
    widths = set(value) if isinstance(value, tuple) else {value}
    if len(widths) > 1:
        raise UserError(
            f"cross_attention_dim = {value} is not supported: all levels attend to one context.",
            key="cross_attention_dim",
            code="unsupported",
        )
    return widths.pop()


def _check_exportable(params: UNetParams) -> None:
    """Raises UserError unless diffusers can build the network."""
    p = params
    check_expressible(
        f"diffusers' {CLASS}",
        (
            ("network.context_channels", not all(p.depths) or not p.context_channels, "attention without a context"),
            ("network.label_tokens", bool(p.label_tokens), "classes as context"),
            ("network.image_size", p.dims != 2, f"networks of {p.dims} dimensions"),
            ("network.resampling", p.resampling != "convolution", f"resampling by '{p.resampling}'"),
            ("network.context_only_middle", p.context_only_middle, "middle that attends to the context only"),
            ("network.up_heads", p.up_heads is not None, "other heads in the decoder"),
            ("network.heads", p.heads is None and p.head_channels is None, "heads of varying width"),
            ("network.norm_groups", any(w % p.norm_groups for w in p.widths), "group norms of varying groups"),
            ("network.upsample_concat", p.upsample_concat, "concatenated condition of another size"),
            ("network.vector_channels", bool(p.vector_channels and p.labels), "class and condition vector at once"),
        ),
    )
