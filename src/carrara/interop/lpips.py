"""Weights of LPIPS (Zhang et al. 2018) on VGG-16, in the layouts of torchvision, LPIPS and latent diffusion."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from carrara.codecs.perceptual import LPIPS, VGG16
from carrara.errors import UserError
from carrara.interop.files import read_checkpoint
from carrara.interop.layout import strip_prefixes


def load(path: str | Path, checksum: str | None = None) -> LPIPS:
    """The distance from a weights file on this machine: nothing is ever downloaded.

    Args:
        path: `.safetensors` or a PyTorch file, see `from_state_dict`.
        checksum: the file's SHA-256 in hexadecimal; None accepts any file.

    Raises:
        UserError: the file is missing, damaged or another one, or lacks a layer.
    """
    path = Path(path)
    if checksum is not None and path.is_file():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != checksum.lower():
            raise UserError(
                f"'{path}' has the SHA-256 {found}, not {checksum}: it is another file.",
                key=str(path),
                code="mismatch",
            )
    return from_state_dict(read_checkpoint(path, last=True).tensors, str(path))


def from_state_dict(state: Mapping[str, Tensor], name: str = "the perceptual weights") -> LPIPS:
    """The distance from a state dict.

    Args:
        state: VGG-16's convolutions under torchvision's names (`features.0.weight`, …) or LPIPS' own
            (`net.slice1.0.weight`, …), and `lin0.model.1.weight`, … where channels have learned weights. A whole VQGAN
            or latent-diffusion checkpoint has them under `loss.perceptual_loss.`.
        name: of the weights, for messages.

    Raises:
        UserError: a layer is missing or of another shape.
    """
    theirs = strip_prefixes(state, "loss.perceptual_loss.")
    learned = "lin0.model.1.weight" in theirs
    network = LPIPS(learned)
    shapes = network.state_dict()
    ours: dict[str, Tensor] = {}
    number = 0  # torchvision counts rectifiers and pools, too
    for depth, widths in enumerate(VGG16):
        number += depth > 0
        for index in range(len(widths)):
            for part in ("weight", "bias"):
                keys = (f"features.{number}.{part}", f"net.slice{depth + 1}.{number}.{part}")
                own = f"groups.{depth}.{index}.{part}"
                ours[own] = _find(theirs, keys, shapes[own].shape, name)
            number += 2
        if learned:
            key, own = f"lin{depth}.model.1.weight", f"weights.{depth}"
            ours[own] = _find(theirs, (key,), (1, widths[-1], 1, 1), name).flatten()
    network.load_state_dict(ours)
    return network.requires_grad_(False).eval()


def _find(state: Mapping[str, Tensor], keys: tuple[str, ...], shape: tuple[int, ...], name: str) -> Tensor:
    for key in keys:
        if key in state and state[key].shape == torch.Size(shape):
            return state[key].float()
    raise UserError(
        f"{name} lack '{keys[0]}' of shape {tuple(shape)}: they are not VGG-16's.", key=keys[0], code="missing"
    )
