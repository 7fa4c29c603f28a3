"""Encoded bytes to an upright 8-bit picture of mode L, RGB or RGBA, with each conversion named."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    f".{ending}"
    for ending in ("png", "jpg", "jpeg", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
)
"""Endings (lower case) of the files that are taken for pictures."""

_ORIENTATION = 0x0112  # the EXIF tag for how the camera was held
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_DARK = 16  # a picture that uses under 1/16 of 16 bits has 8 or 12 in truth, and becomes nearly black

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # does not name the file, as the note does


class UnreadablePicture(Exception):
    """One picture that cannot be read; its text is the reason, without the name."""


def decode(encoded: bytes, name: str = "an image") -> tuple[Image.Image, tuple[str, ...]]:
    """The picture upright by its EXIF tag, 8 bits a channel, mode L, RGB or RGBA, and the conversions made.

    16 bits become 8 by value / 257 (the full scale stays the full scale: nothing is stretched to a picture's
    own range); palettes, CMYK and the like become RGB; whatever carries transparency becomes RGBA; of an
    animation the first frame is taken.

    Args:
        name: of the picture, for the note on a very large one.

    Raises:
        UnreadablePicture: the bytes are empty, cut, or no picture that Pillow reads.
    """
    if not encoded:
        raise UnreadablePicture("the file is empty")
    try:
        try:
            return _upright_8bit(Image.open(io.BytesIO(encoded)), name)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            return _upright_8bit(Image.open(io.BytesIO(_without_texts(encoded))), name)
    except (UnreadablePicture, MemoryError):
        raise
    except Exception as error:  # decoders raise anything from struct.error to IndexError on damaged bytes
        reason = "no image that Pillow can read" if "cannot identify" in str(error) else str(error)
        raise UnreadablePicture(reason.rstrip(".") or type(error).__name__) from error


def _without_texts(png: bytes) -> bytes:
    """A PNG without texts and colour profiles, of which Pillow refuses more than 1 MB, and image tools write more."""
    parts, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in _TEXTS:
            parts.append(png[place:end])
        place = end
    return b"".join(parts)


def conversions(image: Image.Image, name: str = "") -> tuple[str, ...]:
    """What an opened picture must be converted from, by its header alone."""
    notes = []
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        notes.append(f"{name} has {image.width * image.height:,} pixels, which take time and memory at every use")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with a hidden second view
        notes.append("animated: the first frame is taken")
    if _deep(image) or image.mode == "F":
        notes.append("16-bit reduced to 8-bit")
    elif image.mode == "1":
        notes.append("1-bit to gray")
    elif image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        notes.append(f"{_plain(image.mode)} with transparency to RGBA")
    elif image.mode not in ("L", "RGB", "RGBA"):
        notes.append(f"{_plain(image.mode)} to RGB")
    return tuple(notes)


def _deep(image: Image.Image) -> bool:
    """Whether an opened picture has more than 8 bits; of colour Pillow itself keeps the upper 8."""
    return image.mode.startswith("I") or ";16" in str(getattr(image, "tile", ""))


def _upright_8bit(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    notes, deep = conversions(image, name), _deep(image)
    image.load()
    if deep and not image.mode.startswith("I"):
        notes += _depth_notes(max(high for _, high in image.getextrema()[:3]) < 256 // _DARK)  # type: ignore[misc]
    if image.getexif().get(_ORIENTATION, 1) != 1:
        notes += ("turned upright by EXIF",)
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        gray, dark = _from_deep_gray(image)
        return gray, (*notes, *_depth_notes(dark))
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA"), notes
    if image.mode in ("L", "RGB", "RGBA"):
        return image, notes
    return image.convert("L" if image.mode == "1" else "RGB"), notes


def _depth_notes(dark: bool) -> tuple[str, ...]:
    if not dark:
        return ()
    return (
        "nearly black, as under 1/16 of the range of 16 bits is used: save 8- or 12-bit values with 8 bits, or scaled",
    )


def _from_deep_gray(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture in 8 bits, and whether it uses under 1/16 of its range, but is not black."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UnreadablePicture(f"pixels of mode {image.mode} have no fixed range: save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257.0).astype(np.uint8), "L"), 0 < values.max() < 65536 // _DARK


def _plain(mode: str) -> str:
    return {"P": "palette", "PA": "palette", "L": "gray", "LA": "gray", "La": "gray"}.get(mode, mode)
