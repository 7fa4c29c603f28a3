"""Whether a converted model gives the original's outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carrara.codecs import LearnedCodec
from carrara.condition import Condition
from carrara.convert.imported import Convertible
from carrara.errors import UserError
from carrara.files import read_arrays
from carrara.networks import EncoderClassifier, UNet, UNetParams

PARITY = 1e-5
"""The largest difference, as a fraction of the largest output, that float32 rounding explains."""


CONTEXT = 77
"""Tokens of the context that a network's fingerprint is taken with."""


@torch.no_grad()
def fingerprint(part: UNet | EncoderClassifier | LearnedCodec) -> dict[str, Any]:
    """A network's output for x_i = sin(i) over one image, at network time 10, label 0, with the low-resolution image of
    an up-sampler x_i = sin(i) too; a codec's reconstruction of such an image: easily computed in the original program.

    Returns:
        `mean`, `std` and the `first` four values of the output.
    """
    answer = _reconstructed(part) if isinstance(part, LearnedCodec) else _answered(part)
    first = [round(value, 6) for value in answer.double().flatten()[:4].tolist()]
    return {"mean": float(answer.double().mean()), "std": float(answer.double().std()), "first": first}


def _answered(network: UNet | EncoderClassifier) -> Tensor:
    p = network.params
    condition = Condition(label=torch.zeros(1, dtype=torch.int64)) if getattr(p, "num_classes", None) else Condition()
    if isinstance(network, EncoderClassifier):
        condition = Condition()
    elif network.params.concat_channels:
        small = [side // 4 if network.params.upsample_concat else side for side in p.image_size]
        condition = replace(condition, concat=_sines(network.params.concat_channels, *small))
    if width := network.takes.get("context"):
        condition = replace(condition, context=_sines(CONTEXT, width))
    answer: Tensor = network(_sines(p.in_channels, *p.image_size), torch.tensor([10.0]), condition)
    return answer


def _reconstructed(codec: LearnedCodec) -> Tensor:
    """An image of 8×8 latents, there and back."""
    side = 8 * codec.reduction
    return codec.decode(codec.encode(_sines(codec.params.in_channels, side, side)).mode())


@torch.no_grad()
def check_outputs(model: Convertible, path: str | Path) -> dict[str, Any]:
    """Compare the outputs of a network, or of a codec, with those of the original program.

    Args:
        model: of a diffusion model its network is compared.
        path: `.npz` with `x` [B, C, H, W], `t` [B] (the network's own timesteps), `out`, and where the network takes
            them `y` [B] and `low_res` [B, C, h, w]; for a codec with the images `x` and their reconstructions `out`
            (from the posterior's mode).

    Returns:
        `largest_difference`, `largest_output`, and whether the first is within `PARITY` of the second as `equal`.

    Raises:
        UserError: the file cannot be read, or lacks an array.
    """
    arrays = _arrays(path, ("x", "out") if isinstance(model, LearnedCodec) else ("x", "t", "out"))
    x, expected = arrays["x"].float(), arrays["out"].float()
    if isinstance(model, LearnedCodec):
        _check_images(path, x, (model.params.in_channels, model.reduction))
        answer = model.decode(model.encode(x).mode())
    else:
        network = own_network(model)
        label, small = arrays.get("y"), arrays.get("low_res")
        condition = Condition(
            label=None if label is None else label.long(), concat=None if small is None else small.float()
        )
        if isinstance(network, EncoderClassifier):
            condition = Condition()
        _check_shapes(path, network, arrays, condition)
        answer = network(x, arrays["t"].float(), condition)
    if answer.shape != expected.shape:
        raise UserError(
            f"{path}: 'out' has the shape {tuple(expected.shape)}, the network gives {tuple(answer.shape)}.",
            key="out",
            code="shape",
        )
    difference, largest = float((answer - expected).abs().max()), float(expected.abs().max())
    equal = difference <= PARITY * max(largest, 1.0)
    return {"largest_difference": difference, "largest_output": largest, "equal": equal}


def _arrays(path: str | Path, needed: tuple[str, ...]) -> dict[str, Tensor]:
    arrays = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    for key in needed:
        if key not in arrays:
            raise UserError(
                f"{path} lacks the array '{key}': it must contain {', '.join(needed[:-1])} and {needed[-1]}.",
                key=key,
                code="missing",
            )
    for key, array in arrays.items():
        if not array.numel() or (array.is_floating_point() and not bool(array.isfinite().all())):
            raise UserError(f"{path}: '{key}' is empty or not finite.", key=key, code="damaged")
    return arrays


def _check_images(path: str | Path, x: Tensor, shape: tuple[int, int]) -> None:
    """Raises UserError unless x is [B, C, H, W] for C channels and a factor that H and W are multiples of."""
    channels, factor = shape
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
        raise UserError(
            f"{path}: 'x' has the shape {tuple(x.shape)}; [B, {channels}, H, W] with sides that are multiples of "
            f"{factor} is needed.",
            key="x",
            code="shape",
        )


def _check_shapes(
    path: str | Path, network: UNet | EncoderClassifier, arrays: dict[str, Tensor], condition: Condition
) -> None:
    """Raises UserError unless the arrays are what the network takes."""
    p, batch = network.params, len(arrays["x"])
    classes = p.labels if isinstance(p, UNetParams) else 0
    if p.dims == 2:
        _check_images(path, arrays["x"], (p.in_channels, p.factors[-1]))
    lacks = {"y": classes and condition.label is None, "low_res": _concat(network) and condition.concat is None}
    for key, lacking in lacks.items():
        if lacking:
            raise UserError(f"{path} lacks the array '{key}', which the network takes.", key=key, code="missing")
    for key in ("t", "y"):
        if key in arrays and tuple(arrays[key].shape) != (batch,):
            raise UserError(
                f"{path}: '{key}' has the shape {tuple(arrays[key].shape)}, ({batch},) is needed.",
                key=key,
                code="shape",
            )
    if (
        classes
        and condition.label is not None
        and not bool(((condition.label >= 0) & (condition.label < classes)).all())
    ):
        raise UserError(f"{path}: 'y' has labels outside 0 to {classes - 1}.", key="y", code="invalid")
    low_res = condition.concat
    if low_res is not None and (low_res.ndim != 4 or low_res.shape[:2] != (batch, _concat(network))):
        raise UserError(
            f"{path}: 'low_res' has the shape {tuple(low_res.shape)}, ({batch}, {_concat(network)}, h, w) is needed.",
            key="low_res",
            code="shape",
        )


def _concat(network: UNet | EncoderClassifier) -> int:
    return network.params.concat_channels if isinstance(network, UNet) else 0


def own_network(model: Convertible) -> UNet | EncoderClassifier:
    """The network of a diffusion model or classifier.

    Raises:
        UserError: it is not one of Carrara's own.
    """
    network = None if isinstance(model, LearnedCodec) else model.network
    if not isinstance(network, UNet | EncoderClassifier):
        raise UserError(
            "only models around Carrara's own networks can be converted.", key="network.kind", code="unsupported"
        )
    return network


def _sines(*shape: int) -> Tensor:
    return torch.arange(float(np.prod(shape))).sin().reshape(1, *shape)
