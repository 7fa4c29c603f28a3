"""First stages in the layout of diffusers: folders of an `AutoencoderKL` or a `VQModel`, in and out.

A folder holds `config.json` and the weights, `diffusion_pytorch_model.safetensors` (or an older `.bin`). The networks
are latent diffusion's (see `carrara.interop.compvis`) under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import LearnedCodec
from carrara.codecs.quantiser import QuantiserParams
from carrara.codecs.vq import VQAutoencoder
from carrara.errors import UserError, nearest
from carrara.interop.compvis import filled
from carrara.interop.diffusers_folder import CONFIG, SKIP, attention, read_json, read_weights, write_model
from carrara.interop.entries import check_entries, check_numbers
from carrara.interop.layout import Place, leaf, residual_block, to_ours, to_theirs
from carrara.networks.autoencoder import AutoencoderParams, Level
from carrara.networks.backbone import Middle

KL, VQ = "AutoencoderKL", "VQModel"

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
"""What `config.json` may leave out."""
KL_DEFAULTS = DEFAULTS | {
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VQ_DEFAULTS = DEFAULTS | {
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "norm_type": "group",
    "lookup_from_codebook": False,
}
ASIDE = ("sample_size", "force_upcast")
"""Entries that concern pipelines and not the codec."""


def load_codec(folder: str | Path) -> KLAutoencoder | VQAutoencoder:
    """The codec of a folder, in float32 and in eval mode; its scaling factor becomes the latent scale.

    Args:
        folder: of the model itself, as the `vae` or `vqvae` within a pipeline's folder.

    Raises:
        UserError: a file is missing or damaged, the config is of another class or asks for what is not supported, or
            the weights do not fit it.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "codec")
    kind = config.get("_class_name")
    if kind not in (KL, VQ):
        raise UserError(f"{folder / CONFIG} describes a {kind}: {KL} or {VQ} is expected.")
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
    c = _complete(config, VQ_DEFAULTS if vq else KL_DEFAULTS)
    codec: KLAutoencoder | VQAutoencoder
    if vq:
        quantiser = QuantiserParams(codes=c["num_vq_embeddings"], legacy=True, decay=None, restart=0.0)
        params = _params(c, c["vq_embed_dim"])
        codec = filled(lambda: VQAutoencoder(params, quantiser), lambda made: to_ours(state_dict, made, places(made)))
    else:
        params = _params(c, None)
        codec = filled(lambda: KLAutoencoder(params), lambda made: to_ours(state_dict, made, places(made)))
    _set_scale(codec, c)
    return codec


def save_codec(codec: LearnedCodec, folder: str | Path) -> None:
    """Write a folder that diffusers loads: `config.json` and the weights, each whole or not at all.

    Raises:
        UserError: the codec has something that diffusers does not know.
    """
    described = config(codec)
    write_model(Path(folder), described, state_dict(codec))


def state_dict(codec: LearnedCodec) -> dict[str, Tensor]:
    """The codec's weights under diffusers' keys.

    Raises:
        UserError: the codec has something that diffusers does not know.
    """
    _check_exportable(codec)
    return to_theirs(codec, places(codec))


# The config


def config(codec: LearnedCodec) -> dict[str, Any]:
    """The `config.json` that makes diffusers build this codec.

    Raises:
        UserError: the codec has something that diffusers does not know.
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


def _complete(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in ASIDE}
    for key in given:
        if key not in defaults:
            raise UserError(f"config.json has the entry '{key}', which is not supported: {nearest(key, defaults)}")
    check_entries(given, defaults, optional={"scaling_factor": float, "shift_factor": float, "vq_embed_dim": int})
    check_numbers(given.get("latents_std"), "latents_std", zero=False)
    check_numbers(given.get("latents_mean"), "latents_mean")
    if given.get("scaling_factor") == 0:
        raise UserError(
            "the config's scaling_factor is 0: a finite number other than 0 is expected.", key="scaling_factor"
        )
    c = {**defaults, **given}
    for key, fixed in (("act_fn", "silu"), ("norm_type", "group"), ("lookup_from_codebook", False)):
        if key in c and c[key] != fixed:
            raise UserError(f"config.json has {key} = {c[key]!r}: only {fixed!r} is supported.")
    return c


def _params(c: Mapping[str, Any], embedded: int | None) -> AutoencoderParams:
    widths = c["block_out_channels"]
    known = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    known |= {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
    for name in (*c["down_block_types"], *c["up_block_types"]):
        if name not in known:
            raise UserError(f"config.json has a block of the type '{name}': {nearest(name, known)}")
    down = [known[name] for name in c["down_block_types"]]
    if not len(widths) == len(down) == len(c["up_block_types"]):
        raise UserError(
            "config.json must give down_block_types, up_block_types and block_out_channels alike in length."
        )
    if down != [known[name] for name in reversed(c["up_block_types"])]:
        raise UserError("config.json lets encoder and decoder attend at different levels, which is not supported.")
    latent = embedded or c["latent_channels"]
    return AutoencoderParams(
        in_channels=c["in_channels"],
        out_channels=None if c["out_channels"] == c["in_channels"] else c["out_channels"],
        channels=widths[0],
        channel_mult=tuple(_plain(width / widths[0]) for width in widths),
        blocks_per_level=c["layers_per_block"],
        latent_channels=latent,
        hidden_channels=None if latent == c["latent_channels"] else c["latent_channels"],
        encoder_map=c.get("use_quant_conv", True),
        decoder_map=c.get("use_post_quant_conv", True),
        attention=tuple(2**level for level, attends in enumerate(down) if attends),
        middle_attention=c["mid_block_add_attention"],
        norm_groups=c["norm_num_groups"],
    )


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _set_scale(codec: LearnedCodec, c: Mapping[str, Any]) -> None:
    """z = (latent - mean)·factor/std, or (latent - shift)·factor: diffusers' two ways of saying it."""
    factor = 1.0 if c["scaling_factor"] is None else float(c["scaling_factor"])
    if c.get("latents_std") is not None:
        scale = [factor / std for std in c["latents_std"]]
        codec.set_latent_scale(_tensor(scale), _tensor(c.get("latents_mean") or [0.0]))
    else:
        codec.set_latent_scale(factor, c.get("shift_factor") or 0.0)


def _tensor(values: list[float]) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float64)


def _scale_of(codec: LearnedCodec) -> dict[str, Any]:
    scale, shift = codec.latent_scale.tolist(), codec.latent_shift.tolist()
    if len(set(scale)) == 1 and len(set(shift)) == 1:
        return {"scaling_factor": scale[0], "shift_factor": shift[0] or None}
    return {"scaling_factor": 1.0, "latents_mean": shift, "latents_std": [1 / value for value in scale]}


def _check_exportable(codec: LearnedCodec) -> None:
    p = codec.params
    unknown = None
    if not isinstance(codec, KLAutoencoder | VQAutoencoder):
        unknown = f"codec of the kind '{codec.kind}'"
    elif any(width % p.norm_groups for width in p.widths):
        unknown = f"group norms of {p.norm_groups} groups over {list(p.widths)} channels"
    elif p.widths[0] != p.channels:
        unknown = "first level of another width than the first convolution's"
    elif p.tanh or not p.learned_resampling:
        unknown = "closing tanh" if p.tanh else "resampling without convolutions"
    elif p.hidden != p.latent_channels and isinstance(codec, KLAutoencoder):
        unknown = "KL latents of other than the hidden channels"
    elif isinstance(codec, VQAutoencoder) and not (p.encoder_map and p.decoder_map):
        unknown = "VQ model without 1×1 maps beside the latent"
    elif isinstance(codec, VQAutoencoder) and len(_scale_of(codec)) != 2:
        unknown = "latent scale per channel of a VQ model"
    elif isinstance(codec, VQAutoencoder) and any(codec.latent_shift.tolist()):
        unknown = "latent shift of a VQ model"
    if unknown:
        raise UserError(f"diffusers knows no {unknown}, so this codec cannot be written in its layout.")


# Keys


def places(codec: LearnedCodec) -> Iterator[Place]:
    """Where the codec's parameters lie in diffusers' state dict."""
    for half, blocks, resample in (("encoder", "down_blocks", "downsamplers"), ("decoder", "up_blocks", "upsamplers")):
        yield from leaf(codec, f"{half}.stem", f"{half}.conv_in")
        yield from _middle(codec, half)
        # Theirs count as ours do: from what comes first.
        for number, level in enumerate(codec.get_submodule(f"{half}.levels").children()):
            assert isinstance(level, Level)
            mine, theirs = f"{half}.levels.{number}", f"{half}.{blocks}.{number}"
            for index in range(len(level.blocks)):
                yield from residual_block(codec, f"{mine}.blocks.{index}", f"{theirs}.resnets.{index}", SKIP)
            for index in range(len(level.attentions)):
                yield from attention(codec, f"{mine}.attentions.{index}", f"{theirs}.attentions.{index}")
            if level.resample is not None:
                yield from leaf(codec, f"{mine}.resample.conv", f"{theirs}.{resample}.0.conv")
        yield from leaf(codec, f"{half}.norm", f"{half}.conv_norm_out")
        yield from leaf(codec, f"{half}.out", f"{half}.conv_out")
    yield from leaf(codec, "encoder.map", "quant_conv")
    yield from leaf(codec, "decoder.map", "post_quant_conv")
    if isinstance(codec, VQAutoencoder):
        yield Place("quantiser.codebook", ("quantize.embedding.weight",))


def _middle(codec: LearnedCodec, half: str) -> Iterator[Place]:
    middle = codec.get_submodule(f"{half}.middle")
    assert isinstance(middle, Middle)
    yield from residual_block(codec, f"{half}.middle.block_in", f"{half}.mid_block.resnets.0", SKIP)
    if middle.attention is not None:
        yield from attention(codec, f"{half}.middle.attention", f"{half}.mid_block.attentions.0")
    yield from residual_block(codec, f"{half}.middle.block_out", f"{half}.mid_block.resnets.1", SKIP)
