"""Checkpoints of guided-diffusion and improved-diffusion: models of pixels, up-samplers and noisy classifiers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from carrara.classifier import Classifier
from carrara.conditioning import ClassLabels
from carrara.convert import recognise
from carrara.convert.imported import MARK, Contents, Convertible, Hints, Imported, there_and_back, write_weights
from carrara.convert.parity import fingerprint, own_network
from carrara.convert.record import KEY, Record, record, restore
from carrara.convert.record import network as recorded_network
from carrara.errors import UserError, nearest
from carrara.files import write_whole
from carrara.interop import guided_diffusion
from carrara.interop.layout import strip_prefixes
from carrara.model import DiffusionModel
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams
from carrara.presets.published import PUBLISHED, Published
from carrara.process import schedules
from carrara.process.schedules import Discrete


def is_guided_diffusion(contents: Contents) -> bool:
    """Whether these are the weights of such a network, alone in their file."""
    own = strip_prefixes(contents.tensors)
    return "input_blocks.0.0.weight" in own and not any(".transformer_blocks." in key for key in own)


def import_guided_diffusion(contents: Contents, hints: Hints) -> Imported:
    """A checkpoint of guided-diffusion or improved-diffusion: a model, an up-sampler or a classifier.

    Args:
        contents: the weights.
        hints: the `name` is one of `PUBLISHED`; by the shapes where it is left out. `arguments` are the original
            constructor's own, for a checkpoint that is none of the published ones: those that its shapes do not show
            (`num_head_channels`, `image_size`, …). The process goes with them: by default linear, of 1000 steps.

    Raises:
        UserError: the checkpoint fits no model, or leaves something open that must be named.
    """
    checkpoint, config_file = contents.tensors, contents.path.with_suffix(".json")
    written = None if hints != Hints() else _recorded(config_file)
    published, recognised = _from_record(written, config_file) if written is not None else _chosen(checkpoint, hints)
    network: UNet | EncoderClassifier
    if isinstance(published.params, EncoderClassifierParams):
        network = guided_diffusion.load(EncoderClassifier, published.params, checkpoint)
    else:
        network = guided_diffusion.load(UNet, published.params, checkpoint)
    model = _assembled(network, published, f"{contents.path.name}, imported")
    if written is not None:
        restore(model, written, config_file, weights_only=True)
    weights = there_and_back(strip_prefixes(checkpoint), guided_diffusion.state_dict(network))
    described = {"config": str(config_file)} if written is not None else {}
    report = {"recognised": recognised, **described, **weights, "fingerprint": fingerprint(network)}
    return Imported(model, report)


Choice = tuple[Published, list[str]]
"""A network with its process, and the published models that it may be."""


def _chosen(checkpoint: Mapping[str, Tensor], hints: Hints) -> Choice:
    """By the user's name or arguments, else by the shapes."""
    if not hints.arguments and (hints.schedule or hints.diffusion_steps or hints.rescaled_time):
        raise UserError(
            "a published model has its own schedule: --schedule and its like need --set.",
            key="--schedule",
            code="conflict",
        )
    recognised = recognise.choose(hints.name, hints.arguments, lambda: recognise.network(checkpoint), PUBLISHED)
    return (PUBLISHED[recognised[0]] if recognised else _described(checkpoint, hints)), recognised


def _from_record(written: Record, config_file: Path) -> Choice:
    """By what an export wrote."""
    params = recorded_network(written, config_file).params
    if not isinstance(params, UNetParams | EncoderClassifierParams):
        raise UserError(
            f"{config_file} describes no network of guided-diffusion.", key=str(config_file), code="damaged"
        )
    return Published(params=params, schedule="linear", files=()), []


def _recorded(path: Path) -> Record | None:
    """What an export wrote with the weights; None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = content.get(KEY) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def export_guided_diffusion(model: Convertible, path: Path) -> dict[str, Any]:
    """Write the weights under guided-diffusion's keys, and `NAME.json` with the arguments that make the original
    constructor build the network.

    Args:
        model: a diffusion model of pixels, or a classifier.
        path: `.pt` (read by `torch.load`) or `.safetensors`.

    Returns:
        The report: the tensors, the arguments, a fingerprint.

    Raises:
        UserError: the network has something that the original has not, or the name has another ending.
    """
    if not isinstance(model, DiffusionModel | Classifier) or (
        isinstance(model, DiffusionModel) and not model.codec.bounded
    ):
        raise UserError(
            "guided-diffusion has no codecs: write this in the layout compvis or diffusers.",
            key="layout",
            code="unsupported",
        )
    network = own_network(model)
    weights = guided_diffusion.state_dict(network)
    arguments = guided_diffusion.constructor_arguments(network.params)
    report = {"arguments": arguments, "tensors": len(weights), "fingerprint": fingerprint(network)}
    config_file = path.with_suffix(".json")
    write_weights(path, weights)
    write_whole(config_file, (json.dumps({"note": MARK, **report, KEY: record(model)}, indent=2) + "\n").encode())
    unknown = _unknown_there(model)
    note = f"guided-diffusion has no {' and no '.join(unknown)}: {config_file.name} keeps it for `carrara import`"
    return {**report, "config": str(config_file), **({"note": note} if unknown else {})}


def _unknown_there(model: DiffusionModel | Classifier) -> list[str]:
    """What the original's sampling scripts cannot be given of a model."""
    spec, unknown = model.schedule.spec, []
    if spec["kind"] not in ("linear", "cosine"):
        unknown.append(f"schedule {spec['kind']}")
    if isinstance(model, DiffusionModel):
        unknown += [f"prediction of {model.predicts}"] if model.predicts not in ("eps", "x0") else []
        unknown += ["null class"] if model.class_labels is not None and model.class_labels.dropout else []
    return unknown


def _described(checkpoint: Mapping[str, Tensor], hints: Hints) -> Published:
    """What the original's arguments, named or read from the shapes, describe."""
    arguments = guided_diffusion.infer_arguments(checkpoint, **hints.arguments)
    params: UNetParams | EncoderClassifierParams
    if "pool" in arguments:
        params = guided_diffusion.classifier_params(**arguments)
    elif arguments["in_channels"] == 6:  # a low-resolution image concatenated to one of three channels
        params = guided_diffusion.super_resolution_params(**{**arguments, "in_channels": 3})
    else:
        params = guided_diffusion.unet_params(**arguments)
    return Published(
        params=params,
        schedule=hints.schedule or "linear",
        steps=hints.diffusion_steps or 1000,
        rescaled_time=hints.rescaled_time,
        files=(),
    )


def _assembled(network: UNet | EncoderClassifier, found: Published, origin: str) -> DiffusionModel | Classifier:
    kinds = {"linear": schedules.linear, "cosine": schedules.cosine}
    if found.schedule not in kinds:
        raise UserError(
            f"these programs have no schedule '{found.schedule}': {nearest(found.schedule, kinds)}",
            key="--schedule",
            code="unknown",
        )
    scale = 1000 / found.steps if found.rescaled_time else 1.0
    schedule: Discrete = kinds[found.schedule](found.steps, network_scale=scale)
    classes = network.params.num_classes
    names = tuple(map(str, range(classes))) if classes else None
    if isinstance(network, EncoderClassifier):
        return Classifier(network, schedule, names or (), origin=origin)
    height, width = network.params.image_size
    return DiffusionModel(
        network,
        schedule,
        (network.params.prediction_channels, height, width),
        conditioners=(ClassLabels(names),) if names else (),
        origin=origin,
    )
