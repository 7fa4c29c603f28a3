"""Random weights of VGG-16 in torchvision's layout."""

from __future__ import annotations

import torch
from torch import Tensor

from carrara.codecs.perceptual import VGG16

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""The indices of VGG-16's convolutions in torchvision's sequence; pools follow 2, 7, 14, 21 and 28."""
GROUP_ENDS = (2, 7, 14, 21, 28)


def vgg_weights() -> dict[str, Tensor]:
    """VGG-16 and channel weights, drawn; under the names of torchvision and of LPIPS."""
    generator = torch.Generator().manual_seed(0)
    widths = [width for group in VGG16 for width in group]
    state: dict[str, Tensor] = {}
    channels = 3
    for number, width in zip(CONVOLUTIONS, widths, strict=True):
        state[f"features.{number}.weight"] = (
            torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        )
        state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels = width
    for depth, group in enumerate(VGG16):
        state[f"lin{depth}.model.1.weight"] = torch.rand(1, group[-1], 1, 1, generator=generator)
    return state
