"""Checkpoints of latent diffusion and Stable Diffusion (CompVis), in and out: here the first stages, the U-Nets in
`compvis_unet`.

Arguments are those of the original constructors `AutoencoderKL` and `VQModel`: `ddconfig`, `embed_dim`, and for a
VQ model `n_embed`. VQGANs of taming-transformers have the same layers: see `carrara.interop.taming`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from carrara.codecs.discrete import DiscreteAutoencoder
from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import LearnedCodec
from carrara.codecs.quantiser import QuantiserParams
from carrara.codecs.vq import VQAutoencoder
from carrara.errors import UserError, nearest
from carrara.interop import layout
from carrara.interop.compvis_unet import load_unet, unet_state_dict
from carrara.interop.entries import check_entries, check_numbers
from carrara.interop.layout import Place, leaf, residual_block
from carrara.networks import UNet
from carrara.networks.autoencoder import AutoencoderParams, Level
from carrara.networks.backbone import Middle
from carrara.networks.layers import SelfAttention

__all__ = ["load", "load_autoencoder", "load_unet", "own_weights", "places", "state_dict", "untrained"]

StateDict = Mapping[str, Tensor]
AnyCodec = TypeVar("AnyCodec", bound=LearnedCodec)

SHAPE_DEFAULTS: dict[str, Any] = {
    "out_ch": None,
    "ch_mult": (1, 2, 4, 8),
    "attn_resolutions": (),
    "dropout": 0.0,
    "resamp_with_conv": True,
    "double_z": True,
    "attn_type": "vanilla",
    "tanh_out": False,
    "give_pre_end": False,
    "use_linear_attn": False,
}
"""What `ddconfig` may leave out."""
NUMBERS = dict.fromkeys(("ch", "num_res_blocks", "in_channels", "resolution", "z_channels", "embed_dim"), 1) | {
    "n_embed": 1,
    "ch_mult": (1.0,),
    "dropout": 0.0,
}
"""Arguments that must be numbers, with values of their types."""
SHAPE_REQUIRED = ("ch", "num_res_blocks", "in_channels", "resolution", "z_channels")
ASIDE = (
    "lossconfig",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "ckpt_path",
    "ignore_keys",
    "batch_resize_range",
    "scheduler_config",
    "lr_g_factor",
    "use_ema",
    "ema_decay",
    "learn_logvar",
)
"""Arguments of the original constructors that concern its training and not the codec."""
TRAINING_KEYS = ("loss.", "model_ema.", "colorize")
"""Where the original's checkpoints keep what is no part of the codec: loss networks, moving means, a colour map."""
SKIP = "nin_shortcut"
"""The name of the convolution beside a residual block."""
PART = "first_stage_model."
"""Where a latent diffusion model's checkpoint keeps its first stage."""


def load_autoencoder(state_dict: StateDict, **arguments: Any) -> KLAutoencoder | VQAutoencoder:
    """A first stage with the checkpoint's weights, from the arguments of the original `AutoencoderKL`, or with
    `n_embed` of `VQModel`.

    Args:
        state_dict: the first stage's own, or that of a whole latent diffusion model, of which its part is taken.
            Loss networks and moving means are left out.
        arguments: the original constructor's; the entries of `ddconfig` may also stand among them. `scale_factor`,
            an argument of the latent diffusion model (0.18215 for Stable Diffusion), becomes the latent scale.
            Indices are always [B, h, w], whatever `sane_index_shape` says.

    Raises:
        UserError: an argument is unknown or missing, or the checkpoint does not fit the arguments.
    """
    scale = arguments.pop("scale_factor", 1.0)
    codec = load(lambda: untrained(**arguments), state_dict)
    codec.set_latent_scale(scale)
    return codec


def untrained(**arguments: Any) -> KLAutoencoder | VQAutoencoder:
    """A first stage with random weights from the original's arguments; see `load_autoencoder`."""
    if "n_embed" in arguments:
        params, rest = shape(arguments, {"embed_dim", "n_embed", "remap", "sane_index_shape"}, double_z=False)
        return VQAutoencoder(params, quantiser(rest))
    return KLAutoencoder(shape(arguments, {"embed_dim"}, double_z=True)[0])


def state_dict(network: LearnedCodec | UNet) -> dict[str, Tensor]:
    """A first stage's or a U-Net's weights under the original's keys, for its own `load_state_dict`. (The latent
    scale is no weight there: it is the `scale_factor` of the model around it.)

    Raises:
        UserError: it has something that the original does not know.
    """
    if isinstance(network, UNet):
        return unet_state_dict(network)
    return layout.to_theirs(network, _checked(network))


def load(make: Callable[[], AnyCodec], checkpoint: StateDict) -> AnyCodec:
    """A codec with the weights of a checkpoint in the original's layout, in float32 and in eval mode.

    Args:
        make: makes the codec.
        checkpoint: the weights under the original's keys.
    """
    own = own_weights(checkpoint)
    return filled(make, lambda codec: layout.to_ours(own, codec, places(codec)))


def own_weights(checkpoint: StateDict) -> dict[str, Tensor]:
    """A checkpoint's first stage alone, without loss networks and moving means."""
    own = layout.strip_prefixes(checkpoint, PART)
    return {key: value for key, value in own.items() if not key.startswith(TRAINING_KEYS)}


def filled(make: Callable[[], AnyCodec], ours: Callable[[AnyCodec], dict[str, Tensor]]) -> AnyCodec:
    """A codec made without its random start, with given weights; statistics that no layout knows start anew."""
    with torch.device("meta"):
        codec = make()
    weights = ours(codec)
    codec.to_empty(device="cpu")
    for name, buffer in codec.named_buffers():
        buffer.fill_(1 if name == "latent_scale" else 0)
    codec.load_state_dict(weights, strict=False)
    return codec.eval()


# Arguments


def shape(arguments: Mapping[str, Any], known: set[str], *, double_z: bool) -> tuple[AutoencoderParams, dict[str, Any]]:
    """The original's arguments as our params, and those of `known` that are not part of the shape.

    Raises:
        UserError: an argument is unknown or missing, or asks for what is not supported.
    """
    if not isinstance(arguments.get("ddconfig", {}), Mapping):
        raise UserError("ddconfig is no table of the first stage's arguments.", key="ddconfig")
    nested = dict(arguments.get("ddconfig", {}))
    flat = {k: v for k, v in arguments.items() if k in SHAPE_DEFAULTS or k in SHAPE_REQUIRED}
    rest = {k: v for k, v in arguments.items() if k != "ddconfig" and k not in flat and k not in ASIDE}
    a = {**SHAPE_DEFAULTS, **nested, **flat}
    for name, choices in ((n, known | {"ddconfig"}) for n in rest if n not in known):
        raise UserError(f"the original's constructor has no argument '{name}': {nearest(name, choices)}")
    for name in nested:
        if name not in SHAPE_DEFAULTS and name not in SHAPE_REQUIRED:
            raise UserError(f"ddconfig has no entry '{name}': {nearest(name, (*SHAPE_DEFAULTS, *SHAPE_REQUIRED))}")
    for name in (*SHAPE_REQUIRED, *sorted(known & {"embed_dim", "n_embed"})):
        if name not in a and name not in rest:
            raise UserError(f"the argument {name} is missing: it stands in the model's own config.")
    check_entries({**a, **rest}, NUMBERS, optional={"out_ch": int})
    check_numbers(a["attn_resolutions"] or None, "attn_resolutions")
    _check_supported(a, double_z)
    return _params(a, rest), rest


def _params(a: Mapping[str, Any], rest: Mapping[str, Any]) -> AutoencoderParams:
    factors = tuple(2**level for level in range(len(a["ch_mult"])))
    attends = a["attn_type"] != "none"
    return AutoencoderParams(
        in_channels=a["in_channels"],
        out_channels=None if a["out_ch"] in (None, a["in_channels"]) else a["out_ch"],
        channels=a["ch"],
        channel_mult=tuple(a["ch_mult"]),
        blocks_per_level=a["num_res_blocks"],
        latent_channels=rest["embed_dim"],
        hidden_channels=None if a["z_channels"] == rest["embed_dim"] else a["z_channels"],
        # A resolution that no level has leaves attention to the middle, in the original too.
        attention=tuple(f for f in factors if attends and a["resolution"] // f in tuple(a["attn_resolutions"])),
        middle_attention=attends,
        learned_resampling=a["resamp_with_conv"],
        dropout=float(a["dropout"]),
        tanh=a["tanh_out"],
    )


def _check_supported(a: Mapping[str, Any], double_z: bool) -> None:
    refused = {
        "attn_type": a["attn_type"] not in ("vanilla", "vanilla-xformers", "none"),
        "use_linear_attn": a["use_linear_attn"],
        "give_pre_end": a["give_pre_end"],
        "double_z": bool(a["double_z"]) is not double_z,
    }
    for name, wrong in refused.items():
        if wrong:
            raise UserError(
                f"{name} = {a[name]} is not supported for this kind of first stage: no published one has it."
            )


def quantiser(rest: Mapping[str, Any]) -> QuantiserParams:
    """The codebook of a `VQModel`: learned by gradient, with the loss of the weights' own time (β = 0.25, swapped).

    Raises:
        UserError: indices were mapped anew, which needs a file that no checkpoint holds.
    """
    if rest.get("remap") is not None:
        raise UserError("remap is not supported: indices are those of the whole codebook.")
    return QuantiserParams(codes=rest["n_embed"], legacy=True, decay=None, restart=0.0)


def constructor_arguments(codec: LearnedCodec, resolution: int = 256) -> dict[str, Any]:
    """The arguments that make the original's constructor build this codec: the inverse of `shape`.

    Args:
        codec: a KL, VQ or Gumbel autoencoder.
        resolution: the side of its images, from which the original counts the levels that attend.

    Raises:
        UserError: the codec has something that the original does not know.
    """
    _checked(codec)
    p = codec.params
    ddconfig = {
        "double_z": isinstance(codec, KLAutoencoder),
        "z_channels": p.hidden,
        "resolution": resolution,
        "in_channels": p.in_channels,
        "out_ch": p.out_channels or p.in_channels,
        "ch": p.channels,
        "ch_mult": [int(mult) for mult in p.channel_mult],
        "num_res_blocks": p.blocks_per_level,
        "attn_resolutions": [resolution // factor for factor in p.attention],
        "dropout": p.dropout,
    }
    ddconfig |= {} if p.middle_attention else {"attn_type": "none"}
    ddconfig |= {} if p.learned_resampling else {"resamp_with_conv": False}
    ddconfig |= {"tanh_out": True} if p.tanh else {}
    arguments: dict[str, Any] = {"embed_dim": p.latent_channels, "ddconfig": ddconfig}
    if isinstance(codec, VQAutoencoder):
        arguments["n_embed"] = codec.quantiser.params.codes
    elif isinstance(codec, DiscreteAutoencoder):
        arguments["n_embed"] = codec.choice.codes
    return arguments


# Keys


def places(codec: LearnedCodec) -> Iterator[Place]:
    """Where the codec's parameters lie in the original's state dict."""
    yield from leaf(codec, "encoder.stem", "encoder.conv_in")
    yield from _levels(codec, "encoder", "down", "downsample")
    yield from leaf(codec, "encoder.norm", "encoder.norm_out")
    yield from leaf(codec, "encoder.out", "encoder.conv_out")
    yield from leaf(codec, "encoder.map", "quant_conv")
    yield from leaf(codec, "decoder.map", "post_quant_conv")
    yield from leaf(codec, "decoder.stem", "decoder.conv_in")
    yield from _levels(codec, "decoder", "up", "upsample")
    yield from leaf(codec, "decoder.norm", "decoder.norm_out")
    yield from leaf(codec, "decoder.out", "decoder.conv_out")
    if isinstance(codec, VQAutoencoder):
        yield Place("quantiser.codebook", ("quantize.embedding.weight",))
    if isinstance(codec, DiscreteAutoencoder):
        yield from leaf(codec, "logits", "quantize.proj")
        yield Place("codebook", ("quantize.embed.weight",))


def _levels(codec: nn.Module, half: str, theirs: str, resample: str) -> Iterator[Place]:
    """The middle and the levels of one half. Theirs count from the highest resolution, in both halves."""
    middle = codec.get_submodule(f"{half}.middle")
    assert isinstance(middle, Middle)
    yield from residual_block(codec, f"{half}.middle.block_in", f"{half}.mid.block_1", SKIP)
    if middle.attention is not None:
        yield from _attention(codec, f"{half}.middle.attention", f"{half}.mid.attn_1")
    yield from residual_block(codec, f"{half}.middle.block_out", f"{half}.mid.block_2", SKIP)
    levels = list(codec.get_submodule(f"{half}.levels").children())
    for place, level in enumerate(levels):
        assert isinstance(level, Level)
        mine = f"{half}.levels.{place}"
        other = f"{half}.{theirs}.{place if half == 'encoder' else len(levels) - 1 - place}"
        for index in range(len(level.blocks)):
            yield from residual_block(codec, f"{mine}.blocks.{index}", f"{other}.block.{index}", SKIP)
        for index in range(len(level.attentions)):
            yield from _attention(codec, f"{mine}.attentions.{index}", f"{other}.attn.{index}")
        if level.resample is not None and level.resample.conv is not None:
            yield from leaf(codec, f"{mine}.resample.conv", f"{other}.{resample}.conv")


def _attention(codec: nn.Module, mine: str, theirs: str) -> Iterator[Place]:
    assert isinstance(codec.get_submodule(mine), SelfAttention)
    yield from leaf(codec, f"{mine}.norm", f"{theirs}.norm")
    yield from leaf(codec, f"{mine}.qkv", *(f"{theirs}.{name}" for name in ("q", "k", "v")))
    yield from leaf(codec, f"{mine}.out", f"{theirs}.proj_out")


def _checked(codec: LearnedCodec) -> list[Place]:
    """The codec's places, which the original can take up.

    Raises:
        UserError: the codec has something that the original does not know.
    """
    p = codec.params
    unknown = None
    if p.norm_groups != 32 or any(width % 32 for width in p.widths):
        unknown = "group norms of other than 32 groups"
    elif any(mult != int(mult) for mult in p.channel_mult):
        unknown = f"widths of {list(p.channel_mult)} times {p.channels} channels"
    elif not (p.encoder_map and p.decoder_map):
        unknown = "a first stage without 1×1 maps beside the latent"
    elif not p.middle_attention and p.attention:
        unknown = "attention at some levels but not in the middle"
    elif not isinstance(codec, KLAutoencoder | VQAutoencoder | DiscreteAutoencoder):
        unknown = f"codec of the kind '{codec.kind}'"
    if unknown:
        raise UserError(f"the original knows no {unknown}, so this codec cannot be written in its layout.")
    return list(places(codec))
