"""Folders of diffusers: codecs, and pipelines, unconditional or class-conditional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carrara.codecs import LearnedCodec
from carrara.conditioning import ClassLabels
from carrara.convert.imported import (
    DROPOUT,
    INDEX,
    Contents,
    Convertible,
    Hints,
    Imported,
    assembled,
    latent_scale,
    there_and_back,
    whole_folder,
)
from carrara.convert.parity import fingerprint, own_network
from carrara.convert.record import KEY, record, restore
from carrara.convert.stable_diffusion import import_stable_diffusion, is_stable_diffusion
from carrara.entries import read_entries
from carrara.errors import UserError
from carrara.interop import diffusers_codec, diffusers_scheduler, diffusers_unet2d
from carrara.interop.diffusers_folder import CONFIG, read_json, read_weights, write_json
from carrara.model import DiffusionModel
from carrara.networks import UNet

CODECS = ("vae", "vqvae", "movq")
"""What a pipeline may call its first stage."""
RECORD = f"{KEY}.json"


def is_diffusers(contents: Contents) -> bool:
    """Whether diffusers wrote this folder."""
    return "_class_name" in contents.config


def import_diffusers(contents: Contents, hints: Hints) -> Imported:
    """A codec's folder as a codec, a pipeline's as a diffusion model with its codec.

    A pipeline whose U-Net is a `UNet2DModel` comes whole, with the schedule and prediction of its scheduler; the
    scheduler's sampler is not taken over. Of one conditioned on text the first stage is taken, as the report notes.

    Raises:
        UserError: a part is missing, damaged or of a kind that is not known.
    """
    folder, kind = contents.path, contents.config["_class_name"]
    if kind in (diffusers_codec.KL, diffusers_codec.VQ):
        return _codec(folder, kind)
    if kind == diffusers_unet2d.CLASS:
        raise UserError(
            f"{folder} is a U-Net alone: name the pipeline's folder around it, which has its schedule.",
            key=str(folder),
            code="unsupported",
        )
    parts = {
        name: part[1] for name, part in contents.config.items() if isinstance(part, list) and len(part) == 2 and part[0]
    }
    first = next((name for name in CODECS if parts.get(name) in (diffusers_codec.KL, diffusers_codec.VQ)), None)
    if parts.get("unet") == diffusers_unet2d.CLASS and "scheduler" in parts:
        unknown = sorted(parts.keys() - {"unet", "scheduler", first})
        if unknown:
            raise UserError(
                f"{folder} is a {kind} with a '{unknown[0]}', which cannot be imported.",
                key=str(folder),
                code="unsupported",
            )
        return _model(contents, first)
    if is_stable_diffusion(parts):
        return import_stable_diffusion(contents, parts)
    if first is None:
        raise UserError(
            f"{folder} is a {kind}: pipelines of a {diffusers_unet2d.CLASS} and a scheduler, and first stages of the "
            f"kinds {diffusers_codec.KL} and {diffusers_codec.VQ}, can be imported.",
            key=str(folder),
            code="unsupported",
        )
    imported = _codec(folder / first, parts[first])
    network = next((name for name in ("unet", "transformer") if name in parts), "network")
    note = f"only the first stage was imported: the {network} of a {kind} is conditioned on text"
    return Imported(imported.model, {**imported.report, "note": note})


def export_diffusers(model: Convertible, folder: Path) -> dict[str, Any]:
    """Write a codec's folder, or a pipeline's: `unet`, `scheduler`, and of a latent model `vqvae`.

    diffusers' pipelines take no class: of a class-conditional model the parts load as they are, and the names of the
    classes are in `model_index.json` as `id2label`.

    Returns:
        The report: the pipeline's class, the tensors, a fingerprint.

    Raises:
        UserError: the model has something that diffusers has not, or the folder exists.
    """
    if isinstance(model, LearnedCodec):
        with whole_folder(folder) as new:
            diffusers_codec.save_codec(model, new)
        return {"kind": diffusers_codec.config(model)["_class_name"], "fingerprint": fingerprint(model)}
    network = own_network(model)
    if not isinstance(model, DiffusionModel) or not isinstance(network, UNet):
        raise UserError(
            "diffusers has no noisy classifier: write it in the layout guided-diffusion.",
            key="layout",
            code="unsupported",
        )
    codec = model.codec if isinstance(model.codec, LearnedCodec) else None
    scheduler = diffusers_scheduler.config(
        model.schedule, model.predicts, pixels=codec is None, learned_variance=network.params.learned_variance
    )
    index: dict[str, Any] = {
        "_class_name": "DDPMPipeline" if codec is None else "LDMPipeline",
        "unet": ["diffusers", diffusers_unet2d.CLASS],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if model.class_labels is not None:
        index["id2label"] = {str(number): name for number, name in enumerate(model.class_labels.names)}
    if codec is not None:
        index["vqvae"] = ["diffusers", _pipeline_codec(codec)]
    with whole_folder(folder) as new:
        diffusers_unet2d.save_unet(network, new / "unet")
        if codec is not None:
            diffusers_codec.save_codec(codec, new / "vqvae")
        write_json(new / "scheduler" / diffusers_scheduler.FILE, scheduler)
        write_json(new / INDEX, index)
        write_json(new / RECORD, record(model))
    tensors = len(diffusers_unet2d.unet_state_dict(network))
    return {"kind": index["_class_name"], "tensors": tensors, "fingerprint": fingerprint(network)}


def _pipeline_codec(codec: LearnedCodec) -> str:
    """The class of a pipeline's first stage.

    Raises:
        UserError: the pipeline would ignore a part of its latent scale.
    """
    config = diffusers_codec.config(codec)
    if config.get("shift_factor") is not None or config.get("latents_std") is not None:
        raise UserError(
            "diffusers' LDMPipeline has one number as its latent scale, and this codec has a scale and a shift for "
            "each channel: measure it as one, or write the codec alone.",
            key="latent_scale",
            code="unsupported",
        )
    return str(config["_class_name"])


def _codec(folder: Path, kind: str) -> Imported:
    codec = diffusers_codec.load_codec(folder)
    weights = there_and_back(read_weights(folder), diffusers_codec.state_dict(codec))
    report = {"recognised": [kind], "codec": codec.kind, "latent_scale": latent_scale(codec)}
    return Imported(codec, {**report, **weights, "fingerprint": fingerprint(codec)})


def _model(contents: Contents, first: str | None) -> Imported:
    """A pipeline of U-Net and scheduler, and of a codec where there is one."""
    folder = contents.path
    labels = _labels(folder, contents.config.get("id2label"))
    network = diffusers_unet2d.load_unet(folder / "unet", null_label=labels is not None and labels.dropout > 0)
    scheduler = read_json(folder / "scheduler" / diffusers_scheduler.FILE, "pipeline")
    schedule, predicts = diffusers_scheduler.read(scheduler)
    if network.params.learned_variance and scheduler.get("variance_type") != "learned_range":
        raise UserError(
            f"the U-Net in {folder} predicts a variance, and its scheduler's variance_type is "
            f"'{scheduler.get('variance_type')}': only 'learned_range' is supported.",
            key="variance_type",
            code="unsupported",
        )
    imported = None if first is None else _codec(folder / first, str(contents.config[first][1]))
    codec = None if imported is None else imported.model
    assert codec is None or isinstance(codec, LearnedCodec)
    model = assembled(network, schedule, predicts, labels, codec, network.params.image_size, folder)
    if (folder / RECORD).is_file():
        restore(model, read_json(folder / RECORD, "pipeline"), folder / RECORD)
    weights = there_and_back(read_weights(folder / "unet"), diffusers_unet2d.unet_state_dict(network))
    report: dict[str, Any] = {
        "recognised": [contents.config["_class_name"]],
        "schedule": repr(schedule),
        "predicts": predicts,
    }
    if imported is not None:
        report["first_stage"] = {key: imported.report[key] for key in ("codec", "latent_scale", "tensors")}
    return Imported(model, {**report, **weights, "fingerprint": fingerprint(network)})


def _labels(folder: Path, names: Any) -> ClassLabels | None:
    """The classes of a pipeline's U-Net, of which one without a name means "no class"."""
    config = read_entries(read_json(folder / "unet" / CONFIG, "pipeline"), diffusers_unet2d.ENTRIES, CONFIG)
    if config["sample_size"] is None:
        raise UserError(
            f"{folder / 'unet' / CONFIG} lacks sample_size, the side of what the U-Net makes: add it.",
            key="sample_size",
            code="missing",
        )
    rows = config["num_class_embeds"]
    if rows is None:
        return None
    if names is None:
        return ClassLabels(tuple(map(str, range(rows))))
    if not isinstance(names, dict) or not all(key.isdecimal() for key in names):
        raise UserError(
            f"{folder / INDEX}: id2label is {names!r}: the names of the classes by number are expected.", key="id2label"
        )
    if len(names) not in (rows, rows - 1):
        raise UserError(
            f"{folder / INDEX} names {len(names)} classes, and its U-Net has {rows}.", key="id2label", code="mismatch"
        )
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return ClassLabels(ordered, DROPOUT if len(names) < rows else 0.0)
