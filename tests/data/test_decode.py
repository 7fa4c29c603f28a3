"""Every kind of pixel arrives upright, in 8 bits, as L, RGB or RGBA; what cannot be read has a reason."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
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


def deep_png(values: NDArray[Any]) -> bytes:
    """A PNG of 16 bits a channel, [H, W, C], which Pillow reads but does not write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, data) for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def of_depth(brightest: int, dtype: type) -> Image.Image:
    return Image.fromarray(np.linspace(0, brightest, 16).astype(dtype).reshape(4, 4))


DEEP: dict[str, Callable[[int], bytes]] = {
    "gray PNG": lambda brightest: encoded(of_depth(brightest, np.uint16)),
    "gray TIFF": lambda brightest: encoded(of_depth(brightest, np.uint16), "tiff"),
    "gray TIFF of 32 bits": lambda brightest: encoded(of_depth(brightest, np.int32), "tiff"),
    "gray PGM": lambda brightest: encoded(of_depth(brightest, np.uint16), "ppm"),
    "colour PNG": lambda brightest: deep_png(np.full((4, 4, 3), brightest)),
    "colour PNG with alpha": lambda brightest: deep_png(np.full((4, 4, 4), (brightest, 0, 0, 65535))),
    "gray PNG with alpha": lambda brightest: deep_png(np.full((4, 4, 2), (brightest, 65535))),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(
    ("brightest", "dark"), [(0, False), (255, True), (1023, True), (4095, True), (4096, False), (65535, False)]
)
def test_deep_pictures_that_use_under_a_sixteenth_of_their_range_are_named(
    kind: str, brightest: int, dark: bool
) -> None:
    _, notes = decode(DEEP[kind](brightest))
    assert notes[0] == "16-bit reduced to 8-bit"
    if "with alpha" in kind or "colour" in kind:
        dark = brightest < 4096  # Pillow keeps the upper 8 bits alone: 255 becomes 0, as black does
    assert any("nearly black" in note for note in notes) is dark


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
def test_a_png_with_a_long_text_is_read(kind: bytes, after: bool) -> None:
    text = b"x" * (70 * 2**20 if kind == b"tEXt" else 2 * 10**6)  # plain ones count together
    packed = {b"zTXt": b"\0\0", b"iTXt": b"\0\1\0\0\0", b"iCCP": b"\0\0", b"tEXt": b"\0"}[kind]
    data = chunk(kind, b"parameters" + packed + (text if kind == b"tEXt" else zlib.compress(text)))
    whole = png(3)
    place = whole.index(b"IEND" if after else b"IDAT") - 4
    image, notes = decode(whole[:place] + data + whole[place:])
    assert np.array_equal(np.asarray(image), pixels(3))
    assert notes == ()


def test_a_png_with_a_long_text_that_is_cut_is_still_unreadable() -> None:
    data, whole = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2 * 10**6)), png(3)
    place = whole.index(b"IDAT") - 4
    with pytest.raises(UnreadablePicture):
        decode((whole[:place] + data + whole[place:])[:-200])


def test_very_large_pictures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    _, notes = decode(png(1), "walls/big.png")
    assert notes == ("walls/big.png has 144 pixels, which take time and memory at every use",)
    with pytest.raises(UnreadablePicture, match="exceeds limit"):
        decode(png(1, 15, 15))


@pytest.mark.parametrize(
    ("image", "kind", "mode", "note"),
    [
        (picture(1).quantize(8), "png", "RGB", "palette to RGB"),
        (picture(1).convert("CMYK"), "jpeg", "RGB", "CMYK to RGB"),
        (picture(1).convert("LA"), "png", "RGBA", "gray with transparency to RGBA"),
        (picture(1).convert("1"), "png", "L", "1-bit to gray"),
    ],
)
def test_other_modes_are_converted_and_named(image: Image.Image, kind: str, mode: str, note: str) -> None:
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
def test_unreadable_bytes_have_a_reason(data: bytes, reason: str) -> None:
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
