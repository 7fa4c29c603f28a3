"""First stages in the layout of diffusers: folders of an `AutoencoderKL` or a `VQModel`, in and out.

A folder holds `config.json` and the weights, `diffusion_pytorch_model.safetensors` (or an older `.bin`). The networks
are latent diffusion's (see `carrara.interop.compvis`) under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import LearnedCodec
from carrara.codecs.vq import VQAutoencoder
from carrara.entries import IGNORED, Entry, fixed, read_entries
from carrara.errors import UserError, nearest
from carrara.interop import layout
from carrara.interop.compvis import quantiser
from carrara.interop.diffusers_folder import CONFIG, read_json, read_weights, write_model
from carrara.interop.layout import Place, Table, check_expressible
from carrara.interop.unet_keys import DIFFUSERS, multiples
from carrara.networks.autoencoder import AutoencoderParams

KL, VQ = "AutoencoderKL", "VQModel"

BLOCKS = {
    "DownEncoderBlock2D": False,
    "AttnDownEncoderBlock2D": True,
    "UpDecoderBlock2D": False,
    "AttnUpDecoderBlock2D": True,
}
"""Whether a block of a type attends."""
ENTRIES = {
    "_class_name": IGNORED,
    "_diffusers_version": IGNORED,
    "_name_or_path": IGNORED,
    "sample_size": IGNORED,
    "force_upcast": IGNORED,
    "in_channels": Entry(int, 3),
    "out_channels": Entry(int, 3),
    "down_block_types": Entry(tuple[str, ...], ("DownEncoderBlock2D",)),
    "up_block_types": Entry(tuple[str, ...], ("UpDecoderBlock2D",)),
    "block_out_channels": Entry(tuple[int, ...], (64,)),
    "layers_per_block": Entry(int, 1),
    "act_fn": fixed("silu"),
    "norm_num_groups": Entry(int, 32),
    "scaling_factor": Entry(float | None, 0.18215, zero=False),
    "mid_block_add_attention": Entry(bool, True),
}
KL_ENTRIES = ENTRIES | {
    "latent_channels": Entry(int, 4),
    "shift_factor": Entry(float | None, None),
    "latents_mean": Entry(tuple[float, ...] | None, None),
    "latents_std": Entry(tuple[float, ...] | None, None, zero=False),
    "use_quant_conv": Entry(bool, True),
    "use_post_quant_conv": Entry(bool, True),
}
VQ_ENTRIES = ENTRIES | {
    "latent_channels": Entry(int, 3),
    "num_vq_embeddings": Entry(int, 256),
    "vq_embed_dim": Entry(int | None, None),
    "norm_type": fixed("group"),
    "lookup_from_codebook": fixed(False),
}
"""What `config.json` may contain, with diffusers' defaults."""

TABLE: Table = DIFFUSERS | {
    LearnedCodec: {
        "encoder.stem": "encoder.conv_in",
        "encoder.levels.{i}.blocks.{j}": "encoder.down_blocks.{i}.resnets.{j}",
        "encoder.levels.{i}.attentions.{j}": "encoder.down_blocks.{i}.attentions.{j}",
        "encoder.levels.{i}.resample": "encoder.down_blocks.{i}.downsamplers.0",
        "encoder.middle.block_in": "encoder.mid_block.resnets.0",
        "encoder.middle.attention": "encoder.mid_block.attentions.0",
        "encoder.middle.block_out": "encoder.mid_block.resnets.1",
        "encoder.norm": "encoder.conv_norm_out",
        "encoder.out": "encoder.conv_out",
        "encoder.map": "quant_conv",
        "decoder.map": "post_quant_conv",
        "decoder.stem": "decoder.conv_in",
        "decoder.middle.block_in": "decoder.mid_block.resnets.0",
        "decoder.middle.attention": "decoder.mid_block.attentions.0",
        "decoder.middle.block_out": "decoder.mid_block.resnets.1",
        "decoder.levels.{i}.blocks.{j}": "decoder.up_blocks.{i}.resnets.{j}",
        "decoder.levels.{i}.attentions.{j}": "decoder.up_blocks.{i}.attentions.{j}",
        "decoder.levels.{i}.resample": "decoder.up_blocks.{i}.upsamplers.0",
        "decoder.norm": "decoder.conv_norm_out",
        "decoder.out": "decoder.conv_out",
        "quantiser.codebook": "quantize.embedding.weight",
    },
}


def load_codec(folder: str | Path) -> KLAutoencoder | VQAutoencoder:
    """The codec of a folder, in float32 and in eval mode; its scaling factor becomes the latent scale.

    Args:
        folder: of the model itself, as the `vae` or `vqvae` within a pipeline's folder.

    Raises:
        UserError: a file is missing or damaged, the config is of another class or needs what is not supported, or
            the weights do not fit it.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "codec")
    kind = config.get("_class_name")
    if kind not in (KL, VQ):
        raise UserError(
            f"{folder / CONFIG} describes a {kind}: {KL} or {VQ} is expected.", key="_class_name", code="unsupported"
        )
    return from_state_dict(read_weights(folder), vq=kind == VQ, **config)


def from_state_dict(state_dict: Mapping[str, Tensor], *, vq: bool, **config: Any) -> KLAutoencoder | VQAutoencoder:
    """A codec from diffusers' own weights and the entries of its config.

    Args:
        state_dict: the weights.
        vq: a `VQModel` rather than an `AutoencoderKL`.
        config: its `config.json`.

    Raises:
        UserError: see `load_codec`.
    """
    c = read_entries(config, VQ_ENTRIES if vq else KL_ENTRIES, CONFIG)
    params = _params(c, c.get("vq_embed_dim"))
    codec: KLAutoencoder | VQAutoencoder
    if vq:
        codes = quantiser(c["num_vq_embeddings"])
        codec = layout.filled(lambda: VQAutoencoder(params, codes), state_dict, places)
    else:
        codec = layout.filled(lambda: KLAutoencoder(params), state_dict, places)
    _set_scale(codec, c)
    return codec


def save_codec(codec: LearnedCodec, folder: str | Path) -> None:
    """Write a folder that diffusers loads: `config.json` and the weights, each whole or not at all.

    Raises:
        UserError: the codec has something that diffusers does not have.
    """
    described = config(codec)
    write_model(Path(folder), described, state_dict(codec))


def state_dict(codec: LearnedCodec) -> dict[str, Tensor]:
    """The codec's weights under diffusers' keys.

    Raises:
        UserError: the codec has something that diffusers does not have.
    """
    _check_exportable(codec)
    return layout.to_theirs(codec, places(codec))


# The config


def config(codec: LearnedCodec) -> dict[str, Any]:
    """The `config.json` that makes diffusers build this codec.

    Raises:
        UserError: the codec has something that diffusers does not have.
    """
    _check_exportable(codec)
    p = codec.params
    attends = [factor in p.attention for factor in p.factors]
    shared = {
        "in_channels": p.in_channels,
        "out_channels": p.out_channels or p.in_channels,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": list(p.widths),
        "layers_per_block": p.blocks_per_level,
        "act_fn": "silu",
        "latent_channels": p.hidden,
        "norm_num_groups": p.norm_groups,
        "mid_block_add_attention": p.middle_attention,
    }
    if isinstance(codec, VQAutoencoder):
        codes = codec.quantiser.params.codes
        own = {"num_vq_embeddings": codes, "vq_embed_dim": p.latent_channels, "norm_type": "group"}
        return {"_class_name": VQ, **shared, **own, "scaling_factor": _scale_of(codec)["scaling_factor"]}
    maps = {"use_quant_conv": p.encoder_map, "use_post_quant_conv": p.decoder_map}
    return {"_class_name": KL, **shared, **maps, **_scale_of(codec)}


def _params(c: Mapping[str, Any], embedded: int | None) -> AutoencoderParams:
    widths = c["block_out_channels"]
    for half in ("down_block_types", "up_block_types"):
        for name in c[half]:
            if name not in BLOCKS:
                raise UserError(f"{half} has '{name}': {nearest(name, BLOCKS)}", key=half, code="unknown")
        if len(c[half]) != len(widths):
            raise UserError(
                f"{half} has {len(c[half])} entries for the {len(widths)} levels of block_out_channels.",
                key=half,
                code="mismatch",
            )
    down = [BLOCKS[name] for name in c["down_block_types"]]
    if down != [BLOCKS[name] for name in reversed(c["up_block_types"])]:
        raise UserError(
            "encoder and decoder attend at different levels, which is not supported.",
            key="up_block_types",
            code="unsupported",
        )
    latent = embedded or c["latent_channels"]
    return AutoencoderParams(
        in_channels=c["in_channels"],
        out_channels=None if c["out_channels"] == c["in_channels"] else c["out_channels"],
        channels=widths[0],
        channel_mult=multiples(widths),
        blocks_per_level=c["layers_per_block"],
        latent_channels=latent,
        hidden_channels=None if latent == c["latent_channels"] else c["latent_channels"],
        encoder_map=c.get("use_quant_conv", True),
        decoder_map=c.get("use_post_quant_conv", True),
        attention=tuple(2**level for level, attends in enumerate(down) if attends),
        middle_attention=c["mid_block_add_attention"],
        norm_groups=c["norm_num_groups"],
    )


def _set_scale(codec: LearnedCodec, c: Mapping[str, Any]) -> None:
    """z = (latent - mean)·factor/std, or (latent - shift)·factor: diffusers' two forms of it."""
    factor = 1.0 if c["scaling_factor"] is None else float(c["scaling_factor"])
    if c.get("latents_std") is not None:
        scale = [factor / std for std in c["latents_std"]]
        means = c["latents_mean"] or (0.0,)
        codec.set_latent_scale(*(torch.tensor(values, dtype=torch.float64) for values in (scale, means)))
    else:
        codec.set_latent_scale(factor, c.get("shift_factor") or 0.0)


def _scale_of(codec: LearnedCodec) -> dict[str, Any]:
    scale, shift = codec.latent_scale.tolist(), codec.latent_shift.tolist()
    if len(set(scale)) == 1 and len(set(shift)) == 1:
        return {"scaling_factor": scale[0], "shift_factor": shift[0] or None}
    return {"scaling_factor": 1.0, "latents_mean": shift, "latents_std": [1 / value for value in scale]}


def places(codec: LearnedCodec) -> Iterator[Place]:
    """Where the codec's parameters lie in diffusers' state dict."""
    return layout.places(codec, TABLE)


def _check_exportable(codec: LearnedCodec) -> None:
    """Raises UserError unless diffusers can build the codec."""
    p, vq = codec.params, isinstance(codec, VQAutoencoder)
    other = p.hidden != p.latent_channels
    check_expressible(
        "diffusers",
        (
            ("codec.kind", not isinstance(codec, KLAutoencoder | VQAutoencoder), f"codec of the kind '{codec.kind}'"),
            ("codec.norm_groups", any(w % p.norm_groups for w in p.widths), f"norms of {p.norm_groups} groups here"),
            ("codec.channel_mult", p.widths[0] != p.channels, "first level of another width than the first layer's"),
            ("codec.tanh", p.tanh, "closing tanh"),
            ("codec.learned_resampling", not p.learned_resampling, "resampling without convolutions"),
            ("codec.hidden_channels", other and not vq, "KL latents of other than the hidden channels"),
            ("codec.encoder_map", vq and not (p.encoder_map and p.decoder_map), "VQ model without 1×1 maps"),
            ("codec.latent_scale", vq and len(_scale_of(codec)) != 2, "latent scale per channel of a VQ model"),
            ("codec.latent_shift", vq and any(codec.latent_shift.tolist()), "latent shift of a VQ model"),
        ),
    )
