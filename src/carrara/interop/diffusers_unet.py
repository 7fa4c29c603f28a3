"""U-Nets in the layout of diffusers: folders of a `UNet2DConditionModel`, in and out.

A folder holds `config.json` and the weights, `diffusion_pytorch_model.safetensors` (or an older `.bin`). The network
is latent diffusion's (see `carrara.interop.compvis_unet`) under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.interop import diffusers_keys
from carrara.interop.diffusers_folder import CONFIG, read_json, read_weights, write_model
from carrara.interop.entries import check_entries
from carrara.interop.layout import Place, leaf, to_ours, to_theirs
from carrara.interop.unet_keys import TRANSFORMER_BLOCK
from carrara.networks import UNet, UNetParams
from carrara.networks.transformer import SpatialTransformer

CLASS = "UNet2DConditionModel"

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
}
"""What the config may leave out, of what we have too."""
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "addition_embed_type": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
"""Entries of which Stable Diffusion's networks have just these values, the first being the default."""
ASIDE = (
    "upcast_attention",
    "addition_time_embed_dim",
    "addition_embed_type_num_heads",
    "mid_block_only_cross_attention",
)
"""Entries that change nothing for such networks: a kernel's precision, and what their parts do not have."""


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
        UserError: the network has something that diffusers does not know, or the disk is full.
    """
    described = config(network.params)
    write_model(Path(folder), described, unet_state_dict(network))


def from_state_dict(state_dict: Mapping[str, Tensor], params: UNetParams) -> UNet:
    """A network of these params with the weights of a diffusers state dict.

    Raises:
        UserError: a key is missing, unexpected or of another shape; the first one is named.
    """
    with torch.device("meta"):
        network = UNet(params)
    ours = {key: value.float() for key, value in to_ours(state_dict, network, places(network)).items()}
    network.to_empty(device="cpu").load_state_dict(ours)
    return network


def unet_state_dict(network: UNet) -> dict[str, Tensor]:
    """The network's weights under diffusers' keys.

    Raises:
        UserError: the network has something that diffusers does not know.
    """
    config(network.params)
    return to_theirs(network, places(network))


# Configs


def unet_params(config: Mapping[str, Any], *, concat_channels: int = 0) -> UNetParams:
    """A `config.json` as our params.

    Raises:
        UserError: an entry has a value that Stable Diffusion's networks do not have, or is unknown.
    """
    optional = {"projection_class_embeddings_input_dim": int, "class_embed_type": str, "num_class_embeds": int}
    each = ("only_cross_attention", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")
    check_entries(config, DEFAULTS, optional=optional, per_level=(*each, "cross_attention_dim"))
    check_entries(config, {}, optional={"sample_size": int}, per_level=("sample_size",))
    _check(config)
    c = {**DEFAULTS, **{name: _plain(value) for name, value in config.items() if name in DEFAULTS}}
    widths, levels = c["block_out_channels"], len(c["block_out_channels"])
    factors = [2**level for level in range(levels)]
    attends = [kind == "CrossAttnDownBlock2D" for kind in c["down_block_types"]]
    only = _each(c["only_cross_attention"], levels)
    heads, head_channels = _heads(_each(c["attention_head_dim"], levels), widths)
    size = c["sample_size"] or 2 ** (levels - 1)
    out = c["out_channels"]
    in_channels = c["in_channels"] - concat_channels
    if in_channels < 1:
        raise UserError(f"concat_channels = {concat_channels} of in_channels = {c['in_channels']} leave no x.")
    return UNetParams(
        image_size=size if isinstance(size, tuple) else (size, size),
        in_channels=in_channels,
        concat_channels=concat_channels,
        out_channels=None if out == in_channels else out,
        channels=widths[0],
        channel_mult=tuple(w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths),
        blocks_per_level=c["layers_per_block"],
        attention=tuple(factor for factor, yes in zip(factors, attends, strict=True) if yes),
        heads=heads,
        head_channels=head_channels,
        qkv_order="legacy",
        adaptive_norm=c["resnet_time_scale_shift"] == "scale_shift",
        resampling="convolution",
        dropout=float(c["dropout"]),
        transformer_depth=c["transformer_layers_per_block"],
        context_channels=_one("cross_attention_dim", c["cross_attention_dim"]),
        context_only=tuple(factor for factor, yes in zip(factors, only, strict=True) if yes),
        projection="linear" if c["use_linear_projection"] else "convolution",
        norm_groups=c["norm_num_groups"],
        **_told(c),
    )


def config(params: UNetParams) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `unet_params`.

    `in_channels` hold `concat_channels` too.

    Raises:
        UserError: the network has something that diffusers does not know.
    """
    _check_exportable(params)
    attends = [factor in params.attention for factor in params.factors]
    widths = params.widths
    heads = [params.heads or width // (params.head_channels or width) for width in widths]
    told: dict[str, Any] = {"num_class_embeds": params.labels or None}
    if params.vector_channels:
        told["class_embed_type"] = "projection" if params.vector_layers == 2 else "simple_projection"
        told["projection_class_embeddings_input_dim"] = params.vector_channels
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
        **told,
    }


def _check(config: Mapping[str, Any]) -> None:
    if config.get("_class_name", CLASS) != CLASS:
        raise UserError(f"the config is a {config['_class_name']}'s: a {CLASS} is expected.")
    for name, values in FIXED.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{name} = {config[name]} is not supported: Stable Diffusion's U-Nets have {values[0]}.")
    for name in config:
        if not name.startswith("_") and name not in (*DEFAULTS, *FIXED, *ASIDE):
            raise UserError(f"the config's '{name}' is unknown: it may be of a newer diffusers.")
    down = config.get("down_block_types", DEFAULTS["down_block_types"])
    up = config.get("up_block_types", DEFAULTS["up_block_types"])
    for kinds, known in ((down, "DownBlock2D"), (up, "UpBlock2D")):
        for kind in kinds:
            if kind not in (known, f"CrossAttn{known}"):
                raise UserError(
                    f"a {kind} is not supported: Stable Diffusion's U-Nets have CrossAttn{known} and {known}."
                )
    if [kind.startswith("Cross") for kind in down] != [kind.startswith("Cross") for kind in reversed(up)]:
        raise UserError("down_block_types and up_block_types attend at different levels, which is not supported.")


def _told(c: Mapping[str, Any]) -> dict[str, Any]:
    kind = c["class_embed_type"]
    if kind in ("projection", "simple_projection"):
        layers = 2 if kind == "projection" else 1
        return {"vector_channels": c["projection_class_embeddings_input_dim"], "vector_layers": layers}
    if kind is not None:
        raise UserError(f"class_embed_type = '{kind}' is not supported: 'projection' and 'simple_projection' are.")
    return {"num_classes": c["num_class_embeds"]}


def _heads(counts: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int | None, int | None]:
    """The heads of all levels as one number, or as one width. (`attention_head_dim` is the number of heads.)"""
    if len(set(counts)) == 1:
        return counts[0], None
    each = {width // count for width, count in zip(widths, counts, strict=True)}
    if len(each) > 1:
        raise UserError(f"attention_head_dim {list(counts)} gives heads neither of one number nor of one width.")
    return None, each.pop()


def _one(name: str, value: Any) -> int:
    """The one number that a config repeats for each level."""
    values = set(value) if isinstance(value, tuple) else {value}
    if len(values) > 1 or not isinstance(value if isinstance(value, int) else value[0], int):
        raise UserError(f"{name} = {value} is not supported: all levels look at one context.")
    return int(values.pop())


def _each(value: Any, levels: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * levels


def _plain(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _check_exportable(params: UNetParams) -> None:
    unknown = None
    if not all(params.depths) or not params.context_channels:
        unknown = "attention without a context"
    elif params.label_tokens:
        unknown = "classes as context"
    elif params.dims != 2:
        unknown = f"networks of {params.dims} dimensions"
    elif params.resampling != "convolution":
        unknown = f"resampling by '{params.resampling}'"
    elif params.context_only_middle:
        unknown = "a middle that looks at the context only"
    elif params.up_heads is not None:
        unknown = "other heads in the decoder"
    elif params.heads is None and params.head_channels is None:
        unknown = "heads of varying width"
    elif any(width % params.norm_groups for width in params.widths):
        unknown = "group norms of varying groups"
    elif params.upsample_concat:
        unknown = "a concatenated condition of another size"
    elif params.vector_channels and params.labels:
        unknown = "a class beside a condition vector"
    if unknown:
        raise UserError(f"diffusers' {CLASS} knows no {unknown}, so this network cannot be written in its layout.")


# Keys


def places(network: UNet) -> Iterator[Place]:
    """Where every parameter lies in a diffusers state dict."""
    yield from diffusers_keys.backbone(network, _transformer)
    if network.label is not None:
        yield from leaf(network, "label", "class_embedding")
    if network.vector is not None and network.params.vector_layers == 1:
        yield from leaf(network, "vector", "class_embedding")
    elif network.vector is not None:
        yield from leaf(network, "vector.0", "class_embedding.linear_1")
        yield from leaf(network, "vector.2", "class_embedding.linear_2")


def _transformer(network: UNet, mine: str, theirs: str) -> Iterator[Place]:
    transformer = network.get_submodule(mine)
    assert isinstance(transformer, SpatialTransformer)
    axes = 4 if network.params.projection == "convolution" else 0
    yield from leaf(network, f"{mine}.norm", f"{theirs}.norm")
    yield from leaf(network, f"{mine}.project_in", f"{theirs}.proj_in", axes=axes)
    yield from leaf(network, f"{mine}.project_out", f"{theirs}.proj_out", axes=axes)
    for index in range(len(transformer.blocks)):
        for own, other in TRANSFORMER_BLOCK:
            yield from leaf(network, f"{mine}.blocks.{index}.{own}", f"{theirs}.transformer_blocks.{index}.{other}")
