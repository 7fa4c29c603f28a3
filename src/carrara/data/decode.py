"""Encoded bytes to an upright 8-bit picture of mode L, RGB or RGBA, with each conversion named."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    f".{ending}"
    for ending in ("png", "jpg", "jpeg", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
)
"""Endings (lower case) of the files that are taken for pictures."""

_ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held


class UnreadablePicture(Exception):
    """One picture that cannot be read; its text is the reason, without the name."""


def decode(encoded: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture upright by its EXIF tag, 8 bits a channel, mode L, RGB or RGBA, and the conversions made.

    16 bits become 8 by value / 257 (the full scale stays the full scale: nothing is stretched to a picture's
    own range); palettes, CMYK and the like become RGB; whatever carries transparency becomes RGBA; of an
    animation the first frame is taken.

    Raises:
        UnreadablePicture: the bytes are empty, cut, or no picture that Pillow reads.
    """
    if not encoded:
        raise UnreadablePicture("the file is empty")
    try:
        return _upright_8bit(Image.open(io.BytesIO(encoded)))
    except (UnreadablePicture, MemoryError):
        raise
    except Exception as error:  # decoders raise anything from struct.error to IndexError on damaged bytes
        reason = "no image that Pillow can read" if "cannot identify" in str(error) else str(error)
        raise UnreadablePicture(reason.rstrip(".") or type(error).__name__) from error


def _upright_8bit(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    notes = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with a hidden second view
        notes.append("animated: the first frame is taken")
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        notes.append("turned upright by EXIF")
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info:
        return image, tuple(notes)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_gray(image), (*notes, "16-bit reduced to 8-bit")
    if image.mode == "1":
        return image.convert("L"), (*notes, "1-bit to gray")
    if image.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        return image.convert("RGBA"), (*notes, f"{_plain(image.mode)} with transparency to RGBA")
    return image.convert("RGB"), (*notes, f"{_plain(image.mode)} to RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UnreadablePicture(f"pixels of mode {image.mode} have no fixed range: save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257.0).astype(np.uint8), "L")


def _plain(mode: str) -> str:
    return {"P": "palette", "PA": "palette", "L": "gray", "LA": "gray", "La": "gray"}.get(mode, mode)
