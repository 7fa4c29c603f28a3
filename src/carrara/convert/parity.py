"""Whether a converted model gives the original's outputs."""

from __future__ import annotations

from collections.abc import Mapping
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
    arrays = _arrays(path)
    if isinstance(model, LearnedCodec):
        _check_arrays(path, arrays, {"x": (None, model.params.in_channels, None, None)}, model.reduction)
        answer = model.decode(model.encode(arrays["x"].float()).mode())
    else:
        answer = _outputs(own_network(model), path, arrays)
    expected = arrays["out"].float()
    if answer.shape != expected.shape:
        raise UserError(
            f"{path}: 'out' has the shape {tuple(expected.shape)}, the network gives {tuple(answer.shape)}.",
            key="out",
            code="shape",
        )
    difference, largest = float((answer - expected).abs().max()), float(expected.abs().max())
    equal = difference <= PARITY * max(largest, 1.0)
    return {"largest_difference": difference, "largest_output": largest, "equal": equal}


def _outputs(network: UNet | EncoderClassifier, path: str | Path, arrays: Mapping[str, Tensor]) -> Tensor:
    """The network's outputs for the arrays, which are checked first."""
    p, batch = network.params, len(arrays.get("x", ()))
    sizes: dict[str, Sizes] = {"x": (None, p.in_channels, *[None] * p.dims), "t": (batch,)}
    classes = p.labels if isinstance(p, UNetParams) else 0
    concat = p.concat_channels if isinstance(p, UNetParams) else 0
    sizes |= {"y": (batch,)} if classes else {}
    sizes |= {"low_res": (batch, concat, *[None] * p.dims)} if concat else {}
    _check_arrays(path, arrays, sizes, p.factors[-1] if p.dims == 2 else 1)
    label = arrays["y"].long() if classes else None
    if label is not None and not bool(((label >= 0) & (label < classes)).all()):
        raise UserError(f"{path}: 'y' has labels outside 0 to {classes - 1}.", key="y", code="invalid")
    condition = Condition(label=label, concat=arrays["low_res"].float() if concat else None)
    answer: Tensor = network(arrays["x"].float(), arrays["t"].float(), condition)
    return answer


def _arrays(path: str | Path) -> dict[str, Tensor]:
    arrays = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    for key, array in arrays.items():
        if not array.numel() or (array.is_floating_point() and not bool(array.isfinite().all())):
            raise UserError(f"{path}: '{key}' is empty or not finite.", key=key, code="damaged")
    return arrays


Sizes = tuple[int | None, ...]
"""The shape of an array; None is any size."""


def _check_arrays(path: str | Path, arrays: Mapping[str, Tensor], sizes: Mapping[str, Sizes], factor: int) -> None:
    """Raises UserError unless there are `out` and these arrays, and the sides of `x` are multiples of the factor."""
    for key in (*sizes, "out"):
        if key not in arrays:
            raise UserError(
                f"{path} lacks the array '{key}': it must contain {', '.join(sizes)} and out.", key=key, code="missing"
            )
    for key, wanted in sizes.items():
        shape = tuple(arrays[key].shape)
        fits = len(shape) == len(wanted) and all(size in (None, side) for size, side in zip(wanted, shape, strict=True))
        if not fits or (key == "x" and any(side % factor for side in shape[2:])):
            shown = ", ".join("any" if size is None else str(size) for size in wanted)
            multiples = f" with sides that are multiples of {factor}" if key == "x" and factor > 1 else ""
            raise UserError(
                f"{path}: '{key}' has the shape {shape}; ({shown}){multiples} is needed.", key=key, code="shape"
            )


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
