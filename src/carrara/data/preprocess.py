"""From a picture of any size to the network's size: resize, crop, flip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from carrara.errors import UserError, nearest

Resize = Literal["adm", "bicubic", "lanczos", "box", "nearest"]
Crop = Literal["center", "random"]

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LONGEST = 32  # times the target: what a resized picture has beyond is never computed (a strip of 1×60000 fills memory)


@dataclass(frozen=True)
class Preprocess:
    """What is done to every picture, in this order: channels, resize of the shorter side, crop, flip.

    Attributes:
        height, width: the size of the result in pixels.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA); transparency is laid on white unless 4.
        resize: "adm" halves with a box filter while both sides stay at least twice the target, then bicubic
            (Dhariwal & Nichol 2021, as their program does); or one Pillow filter, antialiased.
        crop: "center", or "random" at a place drawn for each global position.
        flip: mirror left-right half of the time. Off by default: letters and clothes have a side.
    """

    height: int
    width: int
    channels: int = 3
    resize: Resize = "adm"
    crop: Crop = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UserError(
                f"data.resolution must be at least 1×1, not {self.height}×{self.width}.", key="data.resolution"
            )
        if self.channels not in _MODES:
            raise UserError(f"data.channels must be 1, 3 or 4, not {self.channels}.", key="data.channels")
        if self.resize != "adm" and self.resize not in FILTERS:
            raise UserError(
                f"data.resize is unknown: '{self.resize}', {nearest(self.resize, ['adm', *FILTERS])}",
                key="data.resize",
                code="unknown",
            )
        if self.crop not in ("center", "random"):
            raise UserError(
                f"data.crop is unknown: '{self.crop}', {nearest(self.crop, ['center', 'random'])}",
                key="data.crop",
                code="unknown",
            )

    def __call__(self, image: Image.Image, draw: Sequence[float] | None = None) -> Tensor:
        """The picture as the network sees it: uint8 [C, H, W].

        Args:
            image: mode L, RGB or RGBA, any size.
            draw: uniform draws in [0, 1): crop top, crop left, flip (`augmentation_draws`); None is the
                centre crop, not flipped.
        """
        return self.cut(self.resized(image), draw)

    def resized(self, image: Image.Image) -> Tensor:
        """All that no draw decides: uint8 [C, h, w], already cut to H×W where the crop is the centre's."""
        image = self._with_channels(image)
        if image.size != (self.width, self.height):
            image = self._shrunk(image)
        pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, self.channels).permute(2, 0, 1)
        if self.crop == "center":
            pixels = self._cropped(pixels, None)
        return pixels.contiguous()

    def cut(self, pixels: Tensor, draw: Sequence[float] | None) -> Tensor:
        """The rest: crop and flip of what `resized` gave, uint8 [C, H, W]."""
        pixels = self._cropped(pixels, draw)
        if self.flip and draw is not None and draw[2] < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    def _cropped(self, pixels: Tensor, draw: Sequence[float] | None) -> Tensor:
        spare_h, spare_w = pixels.shape[1] - self.height, pixels.shape[2] - self.width
        top, left = spare_h // 2, spare_w // 2
        if self.crop == "random" and draw is not None:
            top, left = math.floor(draw[0] * (spare_h + 1)), math.floor(draw[1] * (spare_w + 1))
        return pixels[:, top : top + self.height, left : left + self.width]

    def describe(self) -> str:
        """One sentence for logs and recipes."""
        how = "box-halved, then bicubic (as ADM)" if self.resize == "adm" else self.resize
        crop = "centre crop" if self.crop == "center" else "random crop"
        return (
            f"{_MODES[self.channels]}, shorter side resized ({how}) to cover {self.height}×{self.width}, "
            f"{crop}, {'flipped half of the time' if self.flip else 'never flipped'}"
        )

    def _with_channels(self, image: Image.Image) -> Image.Image:
        if image.mode == "RGBA" and self.channels != 4:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        mode = _MODES[self.channels]
        return image if image.mode == mode else image.convert(mode)

    def _shrunk(self, image: Image.Image) -> Image.Image:
        if self.resize == "adm":
            while image.width >= 2 * self.width and image.height >= 2 * self.height:
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(self.width / image.width, self.height / image.height)
        size = (max(round(image.width * scale), self.width), max(round(image.height * scale), self.height))
        how = FILTERS.get(self.resize, Image.Resampling.BICUBIC)
        if size[0] <= _LONGEST * self.width and size[1] <= _LONGEST * self.height:
            return image.resize(size, how)
        times = 1 if self.crop == "center" else _LONGEST  # a random crop is drawn from the middle of such a strip
        part = (min(size[0], times * self.width), min(size[1], times * self.height))
        left, top = (size[0] - part[0]) // 2, (size[1] - part[1]) // 2
        across, down = image.width / size[0], image.height / size[1]
        box = (left * across, top * down, (left + part[0]) * across, (top + part[1]) * down)
        return image.resize(part, how, box=box)
