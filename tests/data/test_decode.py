"""Every kind of pixel arrives upright, in 8 bits, as L, RGB or RGBA; what cannot be read says why."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from carrara.data.decode import UnreadablePicture, decode
from tests.data.builders import encoded, picture, pixels, png


def gray16() -> Image.Image:
    return Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))


def test_plain_pictures_are_left_alone() -> None:
    image, notes = decode(png(3))
    assert notes == ()
    assert np.array_equal(np.asarray(image), pixels(3))
    gray, notes = decode(encoded(picture(3).convert("L")))
    assert (gray.mode, notes) == ("L", ())


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_keeps_its_full_scale(kind: str) -> None:
    image, notes = decode(encoded(gray16(), kind))
    # value / 257 maps 65535 to 255 and 257 to 1: the scale of the format, not of the picture's own range.
    assert np.asarray(image).tolist() == [[0, 1, 128, 255]]
    assert notes == ("16-bit reduced to 8-bit",)


@pytest.mark.parametrize(
    ("image", "kind", "mode", "note"),
    [
        (picture(1).quantize(8), "png", "RGB", "palette to RGB"),
        (picture(1).convert("CMYK"), "jpeg", "RGB", "CMYK to RGB"),
        (picture(1).convert("LA"), "png", "RGBA", "gray with transparency to RGBA"),
        (picture(1).convert("1"), "png", "L", "1-bit to gray"),
    ],
)
def test_other_modes_are_converted_and_said(image: Image.Image, kind: str, mode: str, note: str) -> None:
    result, notes = decode(encoded(image, kind))
    assert result.mode == mode
    assert notes == (note,)
    assert result.size == image.size


def test_palette_with_transparency_keeps_it() -> None:
    image = picture(1).quantize(4)
    result, notes = decode(encoded(image, "png", transparency=0))
    assert result.mode == "RGBA"
    assert notes == ("palette with transparency to RGBA",)
    assert (np.asarray(result)[..., 3] == 0).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_turned_upright(orientation: int) -> None:
    upright = pixels(5, 4, 6)
    # How the camera stored it, by the EXIF standard: transpose for 5..8, then mirror and turn.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, notes = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), "png", exif=exif))
    assert np.array_equal(np.asarray(image), upright)
    assert notes == (() if orientation == 1 else ("turned upright by EXIF",))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [picture(i).convert("L") for i in range(3)]
    image, notes = decode(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]))
    assert np.array_equal(np.asarray(image.convert("L")), np.asarray(frames[0]))
    assert "animated: the first frame is taken" in notes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a text, not an image", "no image that Pillow can read"),
        (png(1, 64, 64)[:2000], "."),
        (encoded(picture(1, 64, 64), "jpeg")[:1500], "truncated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), "no fixed range"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "floating point"],
)
def test_unreadable_bytes_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadablePicture, match=reason):
        decode(data)


def test_a_damaged_picture_is_read_or_named() -> None:
    whole = png(1)
    reasons = []
    for place in range(0, len(whole), 7):
        damaged = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        try:
            decode(damaged)
        except UnreadablePicture as error:
            reasons.append(str(error))
    assert reasons
    assert all(reasons)
