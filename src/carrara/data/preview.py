"""Three pictures as they are in the data set, and as training would see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from carrara.data.preprocess import Preprocess
from carrara.data.source import Source
from carrara.errors import UserError

_SIDE = 256
_MARGIN = 24
_EXAMPLES = 3


def save_preview(source: Source, prepare: Preprocess, indices: Sequence[int], path: Path) -> None:
    """Write one picture: a row for each of three evenly spaced examples, left before, right after.

    Args:
        indices: readable pictures to choose from.
        path: a .png or .jpg file.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = sorted({indices[round(i)] for i in np.linspace(0, len(indices) - 1, _EXAMPLES)})
    row = _SIDE + _MARGIN
    sheet = Image.new("RGB", (2 * row + _MARGIN, len(chosen) * row + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, index in enumerate(chosen):
        before = source[index].image
        after = _from_pixels(prepare(before).numpy())
        top = _MARGIN + number * row
        for left, picture, text in (
            (_MARGIN, before, f"{source.pictures.name(index)}, {before.width}x{before.height} {before.mode}"),
            (_MARGIN + row, after, f"{prepare.width}x{prepare.height} {after.mode}"),
        ):
            sheet.paste(_fitted(source.shown(picture)), (left, top))
            pen.text((left, top - 14), text[-42:], fill="black")
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the preview cannot be written to {path}: {error}.", key=str(path), code="resources"
        ) from error


def _from_pixels(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _fitted(picture: Image.Image) -> Image.Image:
    """Scaled to fit the square; small pictures in whole pixels, so that each is seen. Transparency on white."""
    scale = min(_SIDE / picture.width, _SIDE / picture.height)
    scale = int(scale) if scale >= 1 else scale
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGBA").resize(size, how)
    return Image.alpha_composite(Image.new("RGBA", size, "white"), fitted).convert("RGB")
