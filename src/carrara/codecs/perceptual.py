"""How different two pictures look: distances between the features of a trained network (Zhang et al. 2018, eq. 1).

At each of several depths the features are scaled to unit length over their channels; squared differences are weighted
by channel, averaged over the positions and added up over the depths.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """The learned perceptual distance on VGG-16's features (Zhang et al. 2018); `interop.lpips.load` reads its weights.

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
        """The distance of pictures [B, C, H, W] in [-1, 1], [B]."""
        weights = None if self.weights is None else list(self.weights)
        return feature_distance(self.features(x), self.features(y), weights)


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
        """The distance of pictures [B, C, H, W] in [-1, 1], [B]."""
        return feature_distance(self.features(x), self.features(y))
