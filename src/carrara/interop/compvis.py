"""Checkpoints of latent diffusion and Stable Diffusion (CompVis), in and out: here the first stages, the U-Nets in
`compvis_unet`.

Arguments are those of the original constructors `AutoencoderKL` and `VQModel`: `ddconfig`, `embed_dim`, and for a
VQ model `n_embed`. VQGANs of taming-transformers have the same layers: see `carrara.interop.taming`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from carrara.codecs.discrete import DiscreteAutoencoder
from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import LearnedCodec
from carrara.codecs.quantiser import QuantiserParams
from carrara.codecs.vq import VQAutoencoder
from carrara.entries import IGNORED, Entry, fixed, read_entries, typed
from carrara.interop import layout
from carrara.interop.compvis_unet import load_unet, unet_state_dict
from carrara.interop.layout import Place, Table, check_expressible, strip_prefixes
from carrara.interop.unet_keys import RESIDUAL
from carrara.networks import UNet
from carrara.networks.autoencoder import AutoencoderParams
from carrara.networks.layers import Downsample, ResidualBlock, SelfAttention, Upsample

__all__ = ["load", "load_autoencoder", "load_unet", "own_weights", "places", "state_dict", "untrained"]

StateDict = Mapping[str, Tensor]
AnyCodec = TypeVar("AnyCodec", bound=LearnedCodec)

SHAPE = {
    "ch": Entry(int),
    "num_res_blocks": Entry(int),
    "in_channels": Entry(int),
    "resolution": Entry(int),
    "z_channels": Entry(int),
    "out_ch": Entry(int | None, None),
    "ch_mult": Entry(tuple[float, ...], (1, 2, 4, 8)),
    "attn_resolutions": Entry(tuple[float, ...], (), empty=True),
    "dropout": Entry(float, 0.0),
    "resamp_with_conv": Entry(bool, True),
    "double_z": IGNORED,  # by the kind: see `shape`
    "attn_type": fixed("vanilla", "vanilla-xformers", "none"),
    "tanh_out": Entry(bool, False),
    "give_pre_end": fixed(False),
    "use_linear_attn": fixed(False),
}
"""The entries of `ddconfig`."""
TRAINING = dict.fromkeys(
    (
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
        "n_labels",  # of a segmentation model: its colour map
    ),
    IGNORED,
)
"""Arguments of the original constructors that concern their training and not the codec."""
KL = TRAINING | {"embed_dim": Entry(int)}
VQ = KL | {"n_embed": Entry(int), "remap": fixed(None), "sane_index_shape": IGNORED}
"""Indices are always [B, h, w], and those of the whole codebook: `remap` needs a file that no checkpoint contains."""
TRAINING_KEYS = ("loss.", "model_ema.", "colorize")
"""Where the original's checkpoints keep what is no part of the codec: loss networks, moving means, a colour map."""
PART = "first_stage_model."
"""Where a latent diffusion model's checkpoint keeps its first stage."""

TABLE: Table = {
    ResidualBlock: RESIDUAL | {"skip": "nin_shortcut"},
    SelfAttention: {"norm": "norm", "qkv": "q k v", "out": "proj_out"},
    Downsample: {"conv": "conv"},
    Upsample: {"conv": "conv"},
    LearnedCodec: {
        "encoder.stem": "encoder.conv_in",
        "encoder.levels.{i}.blocks.{j}": "encoder.down.{i}.block.{j}",
        "encoder.levels.{i}.attentions.{j}": "encoder.down.{i}.attn.{j}",
        "encoder.levels.{i}.resample": "encoder.down.{i}.downsample",
        "encoder.middle.block_in": "encoder.mid.block_1",
        "encoder.middle.attention": "encoder.mid.attn_1",
        "encoder.middle.block_out": "encoder.mid.block_2",
        "encoder.norm": "encoder.norm_out",
        "encoder.out": "encoder.conv_out",
        "encoder.map": "quant_conv",
        "decoder.map": "post_quant_conv",
        "decoder.stem": "decoder.conv_in",
        "decoder.middle.block_in": "decoder.mid.block_1",
        "decoder.middle.attention": "decoder.mid.attn_1",
        "decoder.middle.block_out": "decoder.mid.block_2",
        "decoder.levels.{i}.blocks.{j}": "decoder.up.{-i}.block.{j}",  # from the highest resolution in both halves
        "decoder.levels.{i}.attentions.{j}": "decoder.up.{-i}.attn.{j}",
        "decoder.levels.{i}.resample": "decoder.up.{-i}.upsample",
        "decoder.norm": "decoder.norm_out",
        "decoder.out": "decoder.conv_out",
        "quantiser.codebook": "quantize.embedding.weight",
        "logits": "quantize.proj",
        "codebook": "quantize.embed.weight",
    },
}


def load_autoencoder(state_dict: StateDict, **arguments: Any) -> KLAutoencoder | VQAutoencoder:
    """A first stage with the checkpoint's weights, from the arguments of the original `AutoencoderKL`, or with
    `n_embed` of `VQModel`.

    Args:
        state_dict: the first stage's own, or that of a whole latent diffusion model, of which its part is taken.
            Loss networks and moving means are left out.
        arguments: the original constructor's; the entries of `ddconfig` may also stand among them. `scale_factor`,
            an argument of the latent diffusion model (0.18215 for Stable Diffusion), becomes the latent scale.

    Raises:
        UserError: an argument is unknown or missing, or the checkpoint does not fit the arguments.
    """
    scale = typed(arguments.pop("scale_factor", 1.0), float, "scale_factor")
    codec = load(lambda: untrained(**arguments), state_dict)
    codec.set_latent_scale(scale)
    return codec


def untrained(**arguments: Any) -> KLAutoencoder | VQAutoencoder:
    """A first stage with random weights from the original's arguments; see `load_autoencoder`."""
    if "n_embed" in arguments:
        params, rest = shape(arguments, VQ)
        return VQAutoencoder(params, quantiser(rest["n_embed"]))
    return KLAutoencoder(shape(arguments, KL)[0])


def state_dict(network: LearnedCodec | UNet) -> dict[str, Tensor]:
    """A first stage's or a U-Net's weights under the original's keys, for its own `load_state_dict`. (The latent
    scale is no weight there: it is the `scale_factor` of the model around it.)

    Raises:
        UserError: it has something that the original does not have.
    """
    if isinstance(network, UNet):
        return unet_state_dict(network)
    check_exportable(network)
    return layout.to_theirs(network, places(network))


def load(make: Callable[[], AnyCodec], checkpoint: StateDict) -> AnyCodec:
    """A codec with the weights of a checkpoint in the original's layout, in float32 and in eval mode.

    Args:
        make: makes the codec.
        checkpoint: the weights under the original's keys.
    """
    return layout.filled(make, own_weights(checkpoint), places)


def own_weights(checkpoint: StateDict) -> dict[str, Tensor]:
    """A checkpoint's first stage alone, without loss networks and moving means."""
    own = strip_prefixes(checkpoint, PART)
    return {key: value for key, value in own.items() if not key.startswith(TRAINING_KEYS)}


def places(codec: LearnedCodec) -> Iterator[Place]:
    """Where the codec's parameters lie in the original's state dict."""
    return layout.places(codec, TABLE)


# Arguments


def shape(arguments: Mapping[str, Any], known: Mapping[str, Entry]) -> tuple[AutoencoderParams, dict[str, Any]]:
    """The original's arguments as our params, and those of `known`.

    Args:
        arguments: the constructor's; the entries of `ddconfig` may also stand among them.
        known: the constructor's, but for `ddconfig`; a VQ model's have `n_embed`.

    Raises:
        UserError: an argument is unknown, missing or of another type, or is not supported.
    """
    nested = typed(arguments.get("ddconfig", {}), dict, "ddconfig")
    flat = {name: value for name, value in arguments.items() if name in SHAPE}
    rest = {name: value for name, value in arguments.items() if name != "ddconfig" and name not in SHAPE}
    rest = read_entries(rest, {"ddconfig": IGNORED, **known}, "the original's constructor")
    moments = {"double_z": fixed("n_embed" not in known)}
    a = read_entries({**nested, **flat}, SHAPE | moments, "ddconfig")
    factors = tuple(2**level for level in range(len(a["ch_mult"])))
    attends = a["attn_type"] != "none"
    return AutoencoderParams(
        in_channels=a["in_channels"],
        out_channels=None if a["out_ch"] in (None, a["in_channels"]) else a["out_ch"],
        channels=a["ch"],
        channel_mult=a["ch_mult"],
        blocks_per_level=a["num_res_blocks"],
        latent_channels=rest["embed_dim"],
        hidden_channels=None if a["z_channels"] == rest["embed_dim"] else a["z_channels"],
        # A resolution that no level has leaves attention to the middle, in the original too.
        attention=tuple(f for f in factors if attends and a["resolution"] // f in a["attn_resolutions"]),
        middle_attention=attends,
        learned_resampling=a["resamp_with_conv"],
        dropout=float(a["dropout"]),
        tanh=a["tanh_out"],
    ), rest


def quantiser(codes: int) -> QuantiserParams:
    """The codebook of a `VQModel`: learned by gradient, with the loss of the weights' own time (β = 0.25, swapped)."""
    return QuantiserParams(codes=codes, legacy=True, decay=None, restart=0.0)


def constructor_arguments(codec: LearnedCodec, resolution: int = 256) -> dict[str, Any]:
    """The arguments that make the original's constructor build this codec: the inverse of `shape`.

    Args:
        codec: a KL, VQ or Gumbel autoencoder.
        resolution: the side of its images, from which the original counts the levels that attend.

    Raises:
        UserError: the codec has something that the original does not have.
    """
    check_exportable(codec)
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


def check_exportable(codec: LearnedCodec) -> None:
    """Raises UserError unless the original's constructor can build the codec."""
    p, known = codec.params, isinstance(codec, KLAutoencoder | VQAutoencoder | DiscreteAutoencoder)
    check_expressible(
        "CompVis' first stage",
        (
            ("codec.kind", not known, f"codec of the kind '{codec.kind}'"),
            ("codec.norm_groups", p.norm_groups != 32 or any(w % 32 for w in p.widths), "norm of other than 32 groups"),
            ("codec.channel_mult", any(mult != int(mult) for mult in p.channel_mult), "widths that are no multiples"),
            ("codec.encoder_map", not (p.encoder_map and p.decoder_map), "latents without 1×1 maps"),
            ("codec.attention", not p.middle_attention and bool(p.attention), "attention at levels but not between"),
        ),
    )
