"""How different two pictures look: distances between the features of a trained network (Zhang et al. 2018, eq. 1).

At each of several depths the features are scaled to unit length over their channels; squared differences are weighted
by channel, averaged over the positions and added up over the depths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.networks import EncoderClassifier

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG-16's convolutions; each group but the first starts with a max-pool (Simonyan & Zisserman 2015)."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation, for pictures in [-1, 1]."""
_SMALL = 1e-10
_SIDE = 2 ** (len(VGG16) - 1)
"""The least side that VGG-16 can halve between its groups."""


class Perceptual(Protocol):
    """A distance between pictures: `(x, y) -> [B]`, both [B, C, H, W] in [-1, 1], differentiable in both."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...


def feature_distance(
    x: Sequence[Tensor], y: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The distance of two lists of feature maps, [B, C_l, h_l, w_l] each, in float32, [B].

    Args:
        weights: of the channels of each depth, [C_l]; None weighs them alike, with 1.
    """
    total = x[0].new_zeros(len(x[0]), dtype=torch.float32)
    for a, b, weight in zip(x, y, weights or [None] * len(x), strict=True):
        difference = (_unit(a.float()) - _unit(b.float())).square()
        if weight is not None:
            difference = difference * weight.reshape(1, -1, 1, 1)
        total = total + difference.sum(1).flatten(1).mean(1)
    return total


def _unit(features: Tensor) -> Tensor:
    """Unit length over the channels; a position where all are 0 stays 0, with a gradient of 0."""
    unit: Tensor = features / (features.norm(dim=1, keepdim=True) + _SMALL)
    return unit


class LPIPS(nn.Module):
    """The learned perceptual distance on VGG-16's features (Zhang et al. 2018), from a local weights file.

    Args:
        learned: whether channels have weights fitted to human judgements; False weighs them alike.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        channels = 3
        groups = []
        for widths in VGG16:
            convolutions = []
            for width in widths:
                convolutions.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            groups.append(nn.ModuleList(convolutions))
        self.groups = nn.ModuleList(groups)
        self.weights = nn.ParameterList(torch.ones(widths[-1]) for widths in VGG16) if learned else None
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raises UserError unless VGG-16 takes pictures [channels, height, width]; what it takes is named."""
        if channels not in (1, 3) or min(height, width) < _SIDE:
            raise UserError(
                f"VGG-16 looks at gray or RGB images of at least {_SIDE}×{_SIDE}, not at {channels} channels of "
                f"{height}×{width}: look through a classifier of such images, or leave the perceptual distance out.",
                key="loss.perceptual_from",
                code="shape",
            )

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps after the last rectifier of each of VGG's five groups; x is [B, 3 or 1, H, W] in [-1, 1]."""
        self.check_size(*x.shape[1:])
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        h = (x - self.shift) / self.scale
        maps = []
        for depth, group in enumerate(self.groups):
            h = F.max_pool2d(h, 2) if depth else h
            for convolution in group:  # type: ignore[attr-defined]
                h = F.relu(convolution(h))
            maps.append(h)
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weights = None if self.weights is None else list(self.weights)
        return feature_distance(self.features(x), self.features(y), weights)

    @classmethod
    def load(cls, path: str | Path, checksum: str | None = None) -> LPIPS:
        """The distance from a weights file on this machine: nothing is ever downloaded.

        Args:
            path: `.safetensors` or a PyTorch file, with VGG-16's convolutions under torchvision's names
                (`features.0.weight`, …) or LPIPS' own (`net.slice1.0.weight`, …), and `lin0.model.1.weight`, …
                where channels are to be weighted as learned. A whole VQGAN or latent-diffusion checkpoint, which
                holds them under `loss.perceptual_loss.`, serves as well.
            checksum: the file's SHA-256 in hexadecimal; None accepts any file.

        Raises:
            UserError: the file is missing or another one, or lacks a layer.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"there is no perceptual weights file at '{path}': name one, or set loss.perceptual=0.",
                key="loss.perceptual_from",
                code="missing",
            )
        if checksum is not None:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != checksum.lower():
                raise UserError(
                    f"'{path}' has the SHA-256 {found}, not {checksum}: it is another file.",
                    key="loss.perceptual_checksum",
                    code="mismatch",
                )
        return cls.of(_read(path), str(path))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], name: str = "the perceptual weights") -> LPIPS:
        """The distance from a state dict; see `load`."""
        prefix = "loss.perceptual_loss."
        theirs = {key.removeprefix(prefix): value for key, value in state.items()}
        learned = "lin0.model.1.weight" in theirs
        network = cls(learned)
        ours: dict[str, Tensor] = {}
        number = 0  # torchvision counts rectifiers and pools, too
        for depth, widths in enumerate(VGG16):
            number += depth > 0
            for index in range(len(widths)):
                own = f"groups.{depth}.{index}"
                for part in ("weight", "bias"):
                    keys = (f"features.{number}.{part}", f"net.slice{depth + 1}.{number}.{part}")
                    ours[f"{own}.{part}"] = _find(theirs, keys, network.state_dict()[f"{own}.{part}"], name)
                number += 2
            if learned:
                weight = theirs.get(f"lin{depth}.model.1.weight", torch.empty(0)).flatten()
                ours[f"weights.{depth}"] = _find({"lin": weight}, ("lin",), torch.empty(widths[-1]), name)
        network.load_state_dict(ours)
        return network.requires_grad_(False).eval()


def _find(state: Mapping[str, Tensor], keys: Sequence[str], like: Tensor, name: str) -> Tensor:
    for key in keys:
        if key in state and state[key].shape == like.shape:
            return state[key].float()
    raise UserError(
        f"{name} lack '{keys[0]}' of shape {tuple(like.shape)}: they are not VGG-16's.",
        key="loss.perceptual_from",
        code="damaged",
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"'{path}' is cut short or no safetensors file ({error}): fetch it again.",
                key="loss.perceptual_from",
                code="damaged",
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut pickle fails in whatever it was about to do
        raise UserError(
            f"'{path}' is cut short, holds code, or is no PyTorch file: fetch it again.",
            key="loss.perceptual_from",
            code="damaged",
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(
            f"'{path}' holds no table of named weights: name a file of VGG-16's or LPIPS' weights.",
            key="loss.perceptual_from",
            code="damaged",
        )
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


class ClassifierFeatures(nn.Module):
    """The distance between the features of a classifier trained by Carrara, at its last map of every resolution.

    Args:
        classifier: of noisy images, here given clean ones.
        network_time: the time that it is given: that of the least noise it was trained on.
    """

    def __init__(self, classifier: EncoderClassifier, network_time: float = 0.0) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.network_time = network_time

    def train(self, mode: bool = True) -> ClassifierFeatures:
        """The classifier stays in evaluation mode."""
        return self

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raises UserError unless the classifier takes pictures [channels, height, width]; what it takes is named."""
        own = self.classifier.params
        if channels != own.in_channels:
            raise UserError(
                f"this classifier reads images of {own.in_channels} channels, not of {channels}: take one that was "
                "trained on such images.",
                key="loss.perceptual_from",
                code="shape",
            )
        own.check_size(height, width)

    def features(self, x: Tensor) -> list[Tensor]:
        """The last map of every resolution; x is [B, C, H, W] in [-1, 1], of the classifier's own size."""
        self.check_size(*x.shape[1:])
        time = x.new_full((len(x),), self.network_time)
        last, maps = self.classifier.encoder(x, F.silu(self.classifier.time(time)), None)
        ends = [a for a, b in zip(maps, (*maps[1:], last), strict=True) if a.shape[2:] != b.shape[2:]]
        return [*ends, last]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return feature_distance(self.features(x), self.features(y))
