"""Checkpoints of other programs as models of Carrara, and back, each with a report of what was found equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carrara.classifier import Classifier
from carrara.condition import Condition
from carrara.conditioning import Labels
from carrara.errors import UserError, nearest
from carrara.files import write_whole
from carrara.interop import guided_diffusion
from carrara.interop.files import read_checkpoint
from carrara.interop.published import PUBLISHED, Published, recognise
from carrara.model import DiffusionModel
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams
from carrara.process import schedules
from carrara.process.schedules import Discrete

Model = DiffusionModel | Classifier

PARITY = 1e-5
"""The largest difference, as a share of the largest output, that float32 rounding explains."""


@dataclass(frozen=True)
class Imported:
    """A converted checkpoint.

    Attributes:
        model: what `save` writes and `load` reads.
        report: plain data: what it was recognised as, the tensors that were mapped, the largest difference of the
            weights after going there and back (0), and a `fingerprint` of the network.
    """

    model: Model
    report: dict[str, Any]


def import_guided_diffusion(
    path: str | Path,
    name: str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    schedule: str = "linear",
    steps: int = 1000,
    rescaled_time: bool = False,
) -> Imported:
    """A checkpoint of guided-diffusion or improved-diffusion: a model, an up-sampler or a classifier.

    Args:
        path: `.pt` or `.safetensors`; never run, only read.
        name: one of `PUBLISHED`; by its shapes where it is left out.
        arguments: the original constructor's own, for a checkpoint that is none of the published ones: those that
            its shapes do not tell (`num_head_channels`, `image_size`, …).
        schedule, steps, rescaled_time: the process it was trained for, read only with `arguments`.

    Raises:
        UserError: the file cannot be read, fits no model, or leaves something open that must be named.
    """
    checkpoint = read_checkpoint(path)
    if name is not None and arguments:
        raise UserError(f"'{name}' names the whole network: leave out {', '.join(arguments)}.")
    if arguments:
        found = _described(checkpoint, arguments, schedule, steps, rescaled_time)
        recognised: tuple[str, ...] = ()
    else:
        recognised = (name,) if name is not None else recognise(checkpoint)
        if recognised[0] not in PUBLISHED:
            raise UserError(f"there is no published model '{name}': {nearest(str(name), PUBLISHED)}")
        found = PUBLISHED[recognised[0]]
    network: UNet | EncoderClassifier
    if isinstance(found.params, EncoderClassifierParams):
        network = guided_diffusion.load(EncoderClassifier, found.params, checkpoint)
    else:
        network = guided_diffusion.load(UNet, found.params, checkpoint)
    network.eval()
    model = _assembled(network, found, f"{Path(path).name}, imported")
    theirs = guided_diffusion.strip_prefixes(checkpoint)
    back = guided_diffusion.state_dict(network)
    report = {
        "recognised": list(recognised),
        "tensors": len(theirs),
        "parameters": sum(value.numel() for value in theirs.values()),
        "largest_difference_there_and_back": max(float((back[k] - v.float()).abs().max()) for k, v in theirs.items()),
        "fingerprint": fingerprint(network),
    }
    return Imported(model, report)


def export_guided_diffusion(model: Model, path: str | Path) -> dict[str, Any]:
    """Write the weights under guided-diffusion's keys, and beside them `NAME.json` with the arguments that make the
    original constructor build the network.

    Args:
        path: `.pt` (read by `torch.load`) or `.safetensors`.

    Returns:
        The report: the tensors, the arguments, a fingerprint.

    Raises:
        UserError: the network has something that the original does not know, or the name has another ending.
    """
    import io

    from safetensors.torch import save as to_bytes

    path, network = Path(path), _own(model)
    weights = {key: value.detach().cpu().contiguous() for key, value in guided_diffusion.state_dict(network).items()}
    arguments = guided_diffusion.constructor_arguments(network.params)
    if path.suffix == ".safetensors":
        content = to_bytes(weights)
    elif path.suffix in (".pt", ".pth"):
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        content = buffer.getvalue()
    else:
        raise UserError(f"{path} ends in neither .pt nor .safetensors: name the file that way.")
    report = {"arguments": arguments, "tensors": len(weights), "fingerprint": fingerprint(network)}
    write_whole(path, content)
    write_whole(path.with_suffix(".json"), (json.dumps(report, indent=2) + "\n").encode())
    return report


@torch.no_grad()
def fingerprint(network: UNet | EncoderClassifier) -> dict[str, Any]:
    """What a network answers to x_i = sin(i) over one image, at network time 10, label 0, with the small image of an
    up-sampler x_i = sin(i) too: easily asked of the original program.

    Returns:
        `mean`, `std` and the `first` four values of the output.
    """
    p = network.params
    condition = Condition(label=torch.zeros(1, dtype=torch.int64)) if getattr(p, "num_classes", None) else Condition()
    if isinstance(network, EncoderClassifier):
        condition = Condition()
    elif network.params.concat_channels:
        small = [side // 4 if network.params.upsample_concat else side for side in p.image_size]
        condition = replace(condition, concat=_sines(network.params.concat_channels, *small))
    answer = network(_sines(p.in_channels, *p.image_size), torch.tensor([10.0]), condition).double()
    first = [round(value, 6) for value in answer.flatten()[:4].tolist()]
    return {"mean": float(answer.mean()), "std": float(answer.std()), "first": first}


@torch.no_grad()
def check_outputs(model: Model, path: str | Path) -> dict[str, Any]:
    """Compare a network with what the original program answered.

    Args:
        path: `.npz` with `x` [B, C, H, W], `t` [B] (the network's own timesteps), `out`, and where the network takes
            them `y` [B] and `low_res` [B, C, h, w].

    Returns:
        `largest_difference`, `largest_output`, and whether the first is within `PARITY` of the second as `equal`.

    Raises:
        UserError: the file cannot be read, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as .npz: {error}.") from None
    for key in ("x", "t", "out"):
        if key not in arrays:
            raise UserError(f"{path} lacks the array '{key}': it must hold x, t and out.")
    label, small = arrays.get("y"), arrays.get("low_res")
    condition = Condition(
        label=None if label is None else label.long(), concat=None if small is None else small.float()
    )
    network = _own(model)
    if isinstance(network, EncoderClassifier):
        condition = Condition()
    answer = network(arrays["x"].float(), arrays["t"].float(), condition)
    expected = arrays["out"].float()
    if answer.shape != expected.shape:
        raise UserError(
            f"{path}: 'out' has the shape {tuple(expected.shape)}, the network gives {tuple(answer.shape)}."
        )
    difference, largest = float((answer - expected).abs().max()), float(expected.abs().max())
    equal = difference <= PARITY * max(largest, 1.0)
    return {"largest_difference": difference, "largest_output": largest, "equal": equal}


def _described(
    checkpoint: Mapping[str, Tensor], named: Mapping[str, Any], schedule: str, steps: int, rescaled_time: bool
) -> Published:
    """What the original's arguments, named or read from the shapes, describe."""
    arguments = guided_diffusion.infer_arguments(checkpoint, **named)
    params: UNetParams | EncoderClassifierParams
    if "pool" in arguments:
        params = guided_diffusion.classifier_params(**arguments)
    elif arguments["in_channels"] == 6:  # a small image beside one of three channels
        params = guided_diffusion.super_resolution_params(**{**arguments, "in_channels": 3})
    else:
        params = guided_diffusion.unet_params(**arguments)
    return Published(params=params, schedule=schedule, steps=steps, rescaled_time=rescaled_time, files=())


def _assembled(network: UNet | EncoderClassifier, found: Published, origin: str) -> Model:
    kinds = {"linear": schedules.linear, "cosine": schedules.cosine}
    if found.schedule not in kinds:
        raise UserError(f"these programs know no schedule '{found.schedule}': {nearest(found.schedule, kinds)}")
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
        labels=Labels(names) if names else None,
        origin=origin,
    )


def _own(model: Model) -> UNet | EncoderClassifier:
    if not isinstance(model.network, (UNet, EncoderClassifier)):
        raise UserError("only models around Carrara's own networks can be converted.")
    return model.network


def _sines(*shape: int) -> Tensor:
    return torch.arange(float(np.prod(shape))).sin().reshape(1, *shape)
