"""EfficientNet-Lite0: an image classifier of 4.7 million weights whose features are good for small scorers.

Tan & Le 2019 (EfficientNet-B0's inverted bottlenecks), without squeeze-and-excitation and with ReLU6, as the Lite
models have it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Of each stage: kernel, stride of its first block, expansion, channels, blocks."""

STEM, FEATURES, CLASSES = 32, 1280, 1000
"""Channels of the stem; width of the features; classes of ImageNet."""

EPS = 1e-3
"""Of the batch norms."""


class SameConvolution(nn.Conv2d):
    """A convolution without bias whose output has ⌈H/stride⌉ rows: what it lacks is padded, the odd rest at the end."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            lacking = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [lacking // 2, lacking - lacking // 2]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


class NormedConvolution(nn.Module):
    """Convolution, batch norm and, by default, ReLU6."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, activated: bool = True
    ) -> None:
        super().__init__()
        self.convolution = SameConvolution(channels, out_channels, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(out_channels, eps=EPS)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.convolution(x))
        return F.relu6(h) if self.activated else h


class Bottleneck(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes allow."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels * expansion
        self.expand = NormedConvolution(channels, width, 1) if expansion > 1 else None
        self.depthwise = NormedConvolution(width, width, kernel, stride, groups=width)
        self.project = NormedConvolution(width, out_channels, 1, activated=False)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x if self.expand is None else self.expand(x)  # [B, e·C, H, W]
        h = self.project(self.depthwise(h))  # [B, C', H/s, W/s]
        return h + x if self.residual else h


class EfficientNetLite0(nn.Module):
    """Logits of ImageNet's 1000 classes; `features` gives what comes before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = NormedConvolution(3, STEM, 3, 2)
        channels, blocks = STEM, []
        for kernel, stride, expansion, out, count in STAGES:
            for index in range(count):
                blocks.append(Bottleneck(channels, out, kernel, stride if index == 0 else 1, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = NormedConvolution(channels, FEATURES, 1)
        self.classes = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] to [B, 1280], averaged over the places."""
        h = self.stem(((images + 1) * 127.5 - 127) / 128)  # [B, 32, H/2, W/2]: pixels as the weights know them
        for block in self.blocks:
            h = block(h)
        return self.head(h).mean((2, 3))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] to logits [B, 1000]."""
        return self.classes(self.features(images))  # type: ignore[no-any-return]
