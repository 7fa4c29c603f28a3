"""Stable Diffusion's folders: U-Net, first stage, text encoder, tokenizer and scheduler, as one model of texts.

| family | cross-attention | predicts | channels of the U-Net |
|---|---|---|---|
| 1.x | 768, CLIP ViT-L/14 | ε | 4 |
| 2.x | 1024, OpenCLIP ViT-H/14, layer 23 of 24 | ε or v | 4 |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carrara.codecs import LearnedCodec
from carrara.conditioning import Text
from carrara.convert.imported import DROPOUT, Contents, Imported, latent_scale, there_and_back
from carrara.convert.parity import fingerprint
from carrara.errors import UserError
from carrara.interop import diffusers_codec, diffusers_scheduler, diffusers_unet
from carrara.interop.diffusers_folder import read_json, read_weights
from carrara.model import DiffusionModel
from carrara.text import Pretrained

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""The sub-folders, all of which a model needs."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""What a pipeline may list besides, and the model does without."""

SAMPLING = {"solver": "dpm++2m", "steps": 20, "grid": "trailing", "guidance": 7.5}
"""Of the models where nothing else is chosen."""


def is_stable_diffusion(parts: dict[str, str]) -> bool:
    """Whether a pipeline's parts are Stable Diffusion's: a U-Net conditioned on text.

    Args:
        parts: of `model_index.json`, the class of each.
    """
    return parts.get("unet") == diffusers_unet.CLASS and ("text_encoder" in parts or "tokenizer" in parts)


def import_stable_diffusion(contents: Contents, parts: dict[str, str]) -> Imported:
    """The model of a folder.

    Raises:
        UserError: a part is missing, damaged, or of a kind that does not belong there; it is named.
    """
    folder, kind = contents.path, contents.config["_class_name"]
    for name in PARTS:
        if name not in parts or not (folder / name).is_dir():
            raise UserError(
                f"{folder} is a {kind} without its folder '{name}': copy the whole folder again.",
                key=name,
                code="missing",
            )
    unknown = sorted(parts.keys() - {*PARTS, *UNUSED})
    if unknown:
        raise UserError(
            f"{folder} is a {kind} with a '{unknown[0]}', which cannot be imported.",
            key=unknown[0],
            code="unsupported",
        )
    network = diffusers_unet.load_unet(folder / "unet")
    codec = diffusers_codec.load_codec(folder / "vae")
    text = Text(Pretrained.open(folder / "text_encoder", folder / "tokenizer"), DROPOUT)
    _check_together(folder, network.params.in_channels, network.params.context_channels, codec, text)
    schedule, predicts = diffusers_scheduler.read(
        read_json(folder / "scheduler" / diffusers_scheduler.FILE, "pipeline")
    )
    size = network.params.image_size
    shape = (codec.params.in_channels, *(side * codec.reduction for side in size))
    model = DiffusionModel(
        network=network.eval(),
        schedule=schedule,
        shape=shape,
        predicts=predicts,
        conditioners=(text,),
        codec=codec.eval(),
        sampling=dict(SAMPLING),
        origin=f"{folder.name}, imported",
    )
    report: dict[str, Any] = {"recognised": [kind], "schedule": repr(schedule), "predicts": predicts}
    report["first_stage"] = {"codec": codec.kind, "latent_scale": latent_scale(codec)}
    report["text_encoder"] = {"width": text.slots["context"], "hash": text.encoder.config()["hash"]}
    weights = there_and_back(read_weights(folder / "unet"), diffusers_unet.unet_state_dict(network))
    return Imported(model, {**report, **weights, "fingerprint": fingerprint(network)})


def _check_together(folder: Path, channels: int, width: int, codec: LearnedCodec, text: Text) -> None:
    """Raises UserError unless the parts of a folder fit each other."""
    if codec.params.latent_channels != channels:
        raise UserError(
            f"the U-Net in {folder} works on {channels} channels, its first stage makes "
            f"{codec.params.latent_channels}: the two do not belong together.",
            key="vae",
            code="mismatch",
        )
    if text.slots["context"] != width:
        raise UserError(
            f"the U-Net in {folder} attends to a context of width {width}, its text encoder gives "
            f"{text.slots['context']}: the two do not belong together.",
            key="text_encoder",
            code="mismatch",
        )
