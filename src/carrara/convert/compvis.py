"""Checkpoints of latent diffusion, Stable Diffusion and taming-transformers: first stages, and whole models.

Their programs keep the arguments of a model in a YAML file. Published models are known by their shapes; of others the
YAML is read where it is named, or has the checkpoint's name and folder, which is how models are written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from carrara.codecs import DiscreteAutoencoder, LearnedCodec, VQAutoencoder
from carrara.conditioning import ClassLabels
from carrara.convert import recognise
from carrara.convert.imported import (
    DROPOUT,
    MARK,
    Contents,
    Convertible,
    Hints,
    Imported,
    assembled,
    latent_scale,
    there_and_back,
    write_weights,
)
from carrara.convert.parity import fingerprint, own_network
from carrara.convert.record import KEY, record, restore
from carrara.entries import IGNORED, Entry, fixed, read_entries, typed
from carrara.errors import UserError, nearest
from carrara.files import write_whole
from carrara.interop import compvis, compvis_model, layout, taming
from carrara.interop.compvis_unet import CLASSES, MEAN, PART, unet_weights
from carrara.interop.layout import check_tensor, strip_prefixes
from carrara.model import DiffusionModel
from carrara.networks import UNet
from carrara.presets import compvis_published, published_codecs
from carrara.process.schedules import Discrete

NULLED = "ldm-imagenet-256-v2"
"""The published model whose last class means "no class"."""

HALF = (torch.float16, torch.bfloat16)

STABLE = {
    name: name if "upscaler" in name else "stable-diffusion"
    for name in compvis_published.PUBLISHED
    if name.startswith("stable-diffusion")
}
"""The first stages of Stable Diffusion's models: their shapes are latent diffusion's, their latent scale is not."""

SETTINGS = dict.fromkeys(compvis_model.SCHEDULE, IGNORED) | {  # the schedule's are read with the checkpoint's table
    "parameterization": fixed(*compvis_model.PREDICTS),
    "image_size": Entry(int | tuple[int, int] | None, None),
    "scale_factor": IGNORED,
    "unet_config": IGNORED,
    "first_stage_config": IGNORED,
    "classes": Entry(tuple[Any, ...] | None, None),
    "null_label": Entry(bool | None, None),
    KEY: Entry(dict, {}),
}
"""The settings of a whole model that are read; the last three are ours."""

Settings = dict[str, Any]
StateDict = Mapping[str, Tensor]


def is_whole(contents: Contents) -> bool:
    """Whether this is a latent diffusion model's checkpoint."""
    return any(key.startswith(PART) for key in strip_prefixes(contents.tensors))


def is_first_stage(contents: Contents) -> bool:
    """Whether the tensors are, or hold, a first stage."""
    own = compvis.own_weights(contents.tensors)
    theirs = any(key.startswith(("encoder.down_blocks.", "encoder.mid_block.")) for key in own)  # diffusers'
    return not is_whole(contents) and "encoder.conv_in.weight" in own and not theirs


def quantises(contents: Contents) -> bool:
    """Whether a first stage has a codebook."""
    return any(key.startswith("quantize.") for key in compvis.own_weights(contents.tensors))


def import_compvis(contents: Contents, hints: Hints) -> Imported:
    """A first stage as a codec, or a latent diffusion model with its first stage.

    An unconditional or class-conditional model comes whole. Of one that is conditioned on something else (a text, a
    concatenated image) the first stage is taken, as the report notes.

    Args:
        contents: the checkpoint.
        hints: the `name` is a published first stage's, or for a whole model a published U-Net's; by the shapes where
            it is left out. `config` or `arguments` describe others, in the words of the originals' YAML files: those
            of `model.params`, and `classes` (their names) and `null_label` (the last class means "no class").

    Raises:
        UserError: the checkpoint fits no model, or leaves something open that must be named.
    """
    whole = is_whole(contents)
    if hints.last_weights and not whole:
        raise UserError(
            f"{contents.path} contains a first stage, which has no running mean: leave out --last-weights.",
            key="--last-weights",
            code="conflict",
        )
    for key in hints.arguments:
        if whole and key not in SETTINGS:
            raise UserError(
                f"a latent diffusion model has no setting '{key}': {nearest(key, SETTINGS)}", key=key, code="unknown"
            )
    settings = _settings(contents.path, hints)
    if not whole:
        return _codec(contents, hints.name, settings)
    checkpoint = strip_prefixes(contents.tensors)
    condition = _unknown_condition(checkpoint)
    if condition is None:
        return _model(contents.path, checkpoint, hints, settings)
    if not _has_first_stage(checkpoint):
        raise UserError(
            f"the U-Net in {contents.path} is conditioned on {condition}, and the file has no first stage to take.",
            key=str(contents.path),
            code="unsupported",
        )
    unets = recognise.latent_unet(checkpoint)
    name: str | None = None if hints.name in compvis_published.PUBLISHED else hints.name
    if name is None and not _first_stage_arguments(settings):
        name = next((STABLE[unet] for unet in unets if unet in STABLE), None)
    imported = _codec(contents, name, settings)
    note = f"only the first stage was imported: the U-Net is conditioned on {condition}"
    return replace(imported, report={**imported.report, "u_net": list(unets), "note": note})


def export_compvis(model: Convertible, path: Path) -> dict[str, Any]:
    """Write a KL or VQ codec, or a whole diffusion model, under CompVis' keys, and `NAME.yaml` with the config that
    makes the original build it.

    Args:
        model: a codec, or a diffusion model, unconditional or class-conditional.
        path: `.ckpt` or `.pt` (under `state_dict`), or `.safetensors`.

    Returns:
        The report: the config's name, the tensors, fingerprints.

    Raises:
        UserError: the model has something that the original has not, or the name has another ending.
    """
    if isinstance(model, LearnedCodec):
        return _export_codec(model, path, "ldm.models.autoencoder")
    network = own_network(model)
    if not isinstance(model, DiffusionModel) or not isinstance(network, UNet):
        raise UserError(
            "CompVis' programs have no noisy classifier: write it in the layout guided-diffusion.",
            key="layout",
            code="unsupported",
        )
    codec = model.codec if isinstance(model.codec, LearnedCodec) else None
    scale = 1.0 if codec is None else _one_scale(codec)
    config = compvis_model.config(network, codec, model.schedule, model.predicts, scale)
    if model.class_labels is not None:
        config["classes"] = list(model.class_labels.names)
    config[KEY] = record(model)
    weights = _weights(network, codec) | {"scale_factor": torch.tensor(scale)}
    assert isinstance(model.schedule, Discrete)  # or `config` would have refused it
    report = _write(path, config, weights | compvis_model.tables(model.schedule))
    return {**report, "fingerprint": fingerprint(network)}


def export_taming(model: Convertible, path: Path) -> dict[str, Any]:
    """Write a VQ codec, or a discrete one, under taming-transformers' keys, and its config; see `export_compvis`."""
    if not isinstance(model, VQAutoencoder | DiscreteAutoencoder):
        raise UserError(
            "taming-transformers has codecs with a codebook only: write this in the layout compvis.",
            key="layout",
            code="unsupported",
        )
    return _export_codec(model, path, "taming.models.vqgan")


# First stages


def _codec(contents: Contents, name: str | None, settings: Settings) -> Imported:
    codec, recognised = _first_stage(contents.tensors, name, settings)
    weights = there_and_back(compvis.own_weights(contents.tensors), compvis.state_dict(codec))
    report = {"recognised": recognised, "codec": codec.kind, "latent_scale": latent_scale(codec)}
    return Imported(codec, {**report, **weights, "fingerprint": fingerprint(codec)})


def _first_stage(tensors: StateDict, name: str | None, settings: Settings) -> tuple[LearnedCodec, list[str]]:
    """A first stage, and the names of the published ones that it may be.

    Args:
        tensors: its own, or a whole model's.
        name: of a published first stage, or None.
        settings: the `params` of a config, of the first stage or of a model around it.

    Raises:
        UserError: the checkpoint fits none.
    """
    arguments, known = _first_stage_arguments(settings), published_codecs.PUBLISHED
    recognised = recognise.choose(name, arguments, lambda: recognise.first_stage(tensors), known)
    if not arguments:
        arguments = dict(known[recognised[0]])
    scale = typed(settings.get("scale_factor", arguments.pop("scale_factor", 1.0)), float, "scale_factor")
    load = taming.load_vq if "n_embed" in arguments else compvis.load_autoencoder
    codec = load(tensors, **arguments)
    stored = tensors.get("scale_factor")
    if stored is not None:
        check_tensor("scale_factor", stored)
        near = torch.isclose(stored.double(), torch.tensor(scale).double(), rtol=torch.finfo(stored.dtype).eps)
        scale = scale if stored.dtype in HALF and bool(near) else float(stored)
    if scale == 0:
        raise UserError("scale_factor is 0: it must be a finite number other than 0.", key="scale_factor")
    codec.set_latent_scale(scale)
    return codec, recognised


def _first_stage_arguments(settings: Settings) -> dict[str, Any]:
    """The settings of the first stage: it stands within a model, or alone."""
    if "first_stage_config" in settings:
        return _params(settings, "first_stage_config")
    return {name: value for name, value in settings.items() if name not in SETTINGS}


def _has_first_stage(checkpoint: StateDict) -> bool:
    return any(key.startswith(compvis.PART) for key in checkpoint)


def _export_codec(codec: LearnedCodec, path: Path, package: str) -> dict[str, Any]:
    config: dict[str, Any] = {"model": compvis_model.first_stage_config(codec, package)}
    scale = _one_scale(codec)
    if scale != 1:
        config["scale_factor"] = scale
    return {**_write(path, config, compvis.state_dict(codec)), "fingerprint": fingerprint(codec)}


def _one_scale(codec: LearnedCodec) -> float:
    """The one number that latent diffusion multiplies latents with.

    Raises:
        UserError: the codec's latent scale is more than that.
    """
    scales = set(codec.latent_scale.tolist())
    if len(scales) > 1 or any(codec.latent_shift.tolist()):
        raise UserError(
            "latent diffusion has one number as its latent scale, and this codec has a scale and a shift for each "
            "channel: measure it as one, or write the codec in the layout diffusers.",
            key="latent_scale",
            code="unsupported",
        )
    return float(scales.pop())


# Whole models


def _unknown_condition(checkpoint: StateDict) -> str | None:
    """What the U-Net is conditioned on, other than a class; None where there is no such thing."""
    found = layout.shapes(unet_weights(checkpoint))
    if not {"input_blocks.0.0.weight", "out.2.weight"} <= found.keys():
        raise UserError(
            f"the checkpoint's U-Net ('{PART}…') is no CompVis U-Net: it lacks its first or last layer.",
            key=PART,
            code="unsupported",
        )
    if found["input_blocks.0.0.weight"][1] != found["out.2.weight"][0]:
        return "a concatenated image"
    if "label_emb.0.0.weight" in found or "label_emb.bias" in found:
        return "the embedding of an image"
    if "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in found and CLASSES not in checkpoint:
        return "text"
    return None


def _model(path: Path, checkpoint: StateDict, hints: Hints, settings: Settings) -> Imported:
    """A model, unconditional or class-conditional."""
    choices = read_entries(settings, SETTINGS, "the config", others=True)
    arguments, recognised = _unet_arguments(checkpoint, hints.name, settings)
    codec, first = _first_stage(checkpoint, None, settings) if _has_first_stage(checkpoint) else (None, [])
    schedule = compvis_model.schedule(checkpoint, settings)
    mean = not hints.last_weights and any(key.startswith(f"{MEAN}diffusion_model") for key in checkpoint)
    tokens = CLASSES in checkpoint
    labels, null = _labels(checkpoint, tokens, choices, NULLED in recognised)
    network = compvis.load_unet(checkpoint, class_tokens=tokens, null_label=null, ema=mean, **arguments).eval()
    side = choices["image_size"] or network.params.image_size
    size = side if isinstance(side, tuple) else (side, side)
    model = assembled(network, schedule, choices["parameterization"], labels, codec, size, path)
    if choices[KEY] and not hints.arguments:
        restore(model, choices[KEY], path.with_suffix(".yaml"))
    whole = unet_weights(checkpoint, mean)
    theirs = {PART + key: value for key, value in whole.items()}
    theirs |= {key: value for key, value in checkpoint.items() if tokens and key == CLASSES}
    theirs |= {} if codec is None else {compvis.PART + k: v for k, v in compvis.own_weights(checkpoint).items()}
    report = {
        "recognised": recognised,
        "first_stage": first,
        "weights": "running mean" if mean else "last",
        "schedule": repr(schedule),
        "latent_scale": 1.0 if codec is None else latent_scale(codec),
        **there_and_back(theirs, _weights(network, codec)),
        "fingerprint": fingerprint(network),
    }
    return Imported(model, report)


def _unet_arguments(checkpoint: StateDict, name: str | None, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """The constructor's arguments of a model's U-Net, and the published ones that it may be."""
    named, known = _params(settings, "unet_config"), compvis_published.PUBLISHED
    recognised = recognise.choose(name, named, lambda: recognise.latent_unet(checkpoint), known)
    if not named and not recognised:
        raise UserError(
            "the checkpoint's U-Net is none of the published ones: name the original's config with --config, or its "
            "heads with --set unet_config.params.num_heads=N (or num_head_channels).",
            key="unet_config",
            code="missing",
        )
    arguments = dict(named or known[recognised[0]])
    if "image_size" not in arguments and "image_size" not in settings:
        raise UserError(
            "shapes do not show the size of the latents: name it with --set image_size=N.",
            key="image_size",
            code="missing",
        )
    return arguments, recognised


def _labels(
    checkpoint: StateDict, tokens: bool, choices: Mapping[str, Any], published: bool
) -> tuple[ClassLabels | None, bool]:
    """The classes, and whether the table's last row means that there is none."""
    table = checkpoint.get(CLASSES if tokens else f"{PART}label_emb.weight")
    if table is None:
        return None, False
    names, null = choices["classes"], choices["null_label"]
    if null is None:
        null = published if names is None else len(names) == len(table) - 1
    count = len(table) - null
    names = tuple(map(str, range(count))) if names is None else tuple(map(str, names))
    if len(names) != count:
        raise UserError(
            f"{len(names)} classes are named, and the checkpoint has {count}.", key="classes", code="mismatch"
        )
    return ClassLabels(names, DROPOUT if null else 0.0), null


def _weights(network: UNet, codec: LearnedCodec | None) -> dict[str, Tensor]:
    """A model's weights under the keys of a whole checkpoint."""
    unet, table = compvis_model.weights(network)
    found = {PART + key: value for key, value in unet.items()}
    found |= {} if table is None else {CLASSES: table}
    found |= {} if codec is None else {compvis.PART + k: v for k, v in compvis.state_dict(codec).items()}
    return found


# Files


def _settings(path: Path, hints: Hints) -> Settings:
    """The settings in the config of the checkpoint, and over them those of the user.

    Raises:
        UserError: the config cannot be read, or describes no model.
    """
    config_file = path.with_suffix(".yaml")
    config = hints.config or (config_file if config_file.is_file() and hints.name is None else None)
    if config is None:
        return dict(hints.arguments)
    try:
        described = yaml.safe_load(config.read_text(encoding="utf-8"))
        model = described["model"]
        own = {key: described[key] for key in ("classes", "scale_factor", KEY) if key in described}
        return _merged({**model.get("params", {}), **own}, hints.arguments)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{config} cannot be read: {reason}.", key=str(config), code="damaged") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{config} describes no model of CompVis' programs: it has no model.params.",
            key=str(config),
            code="unsupported",
        ) from None


def _params(settings: Settings, part: str) -> dict[str, Any]:
    """The arguments of a part of the model."""
    described: Settings = typed(settings.get(part, {}), dict, part)
    return dict(typed(described.get("params", {}), dict, f"{part}.params"))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Settings:
    """One set of nested settings over another."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _write(path: Path, config: Mapping[str, Any], weights: StateDict) -> dict[str, Any]:
    config_file = path.with_suffix(".yaml")
    plain = json.loads(json.dumps(config))  # without tuples, which YAML would mark as Python's
    text = f"# {MARK}\n" + yaml.safe_dump(plain, sort_keys=False)
    write_weights(path, weights, nested=True)
    write_whole(config_file, text.encode())
    return {"config": str(config_file), "tensors": len(weights)}
