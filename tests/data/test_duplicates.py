"""Duplicates are found whatever their encoding, near ones as a comparison of all pairs would find them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from carrara.data import duplicates
from carrara.data.decode import decode
from tests.data.builders import encoded, picture


def scene(number: int, side: int = 96) -> Image.Image:
    """A smooth random picture, as photographs are smoother than noise."""
    return picture(number, 8, 8).resize((side, side), Image.Resampling.BICUBIC)


def look(images: list[Image.Image]) -> list[list[int]]:
    gray, colour = zip(*map(duplicates.thumbnails, images), strict=True)
    return duplicates.near_groups(duplicates.perceptual_hashes(np.stack(gray)), np.stack(colour))


def test_exact_duplicates_do_not_depend_on_the_encoding() -> None:
    image = scene(1)
    hashes = [
        duplicates.pixel_hash(decode(encoded(i, kind))[0])
        for i, kind in [(image, "png"), (scene(2), "png"), (image, "bmp"), (image, "tiff"), (scene(2), "webp")]
    ]
    assert duplicates.exact_groups(hashes) == [[0, 2, 3]]


def test_the_shape_is_part_of_the_pixels() -> None:
    flat = [Image.new("L", size) for size in ((4, 9), (6, 6))]
    assert duplicates.exact_groups([duplicates.pixel_hash(i) for i in flat]) == []


def test_near_duplicates_survive_what_happens_to_photographs() -> None:
    image = scene(1)
    changed = [
        image,
        decode(encoded(image, "jpeg", quality=50))[0],
        image.resize((40, 40), Image.Resampling.LANCZOS),
        ImageEnhance.Brightness(image).enhance(1.04),
        image.filter(ImageFilter.GaussianBlur(1)),
    ]
    assert look([*changed, *(scene(i) for i in range(2, 30))]) == [[0, 1, 2, 3, 4]]


def test_another_colour_is_another_picture() -> None:
    gray = scene(3).convert("L")
    red = Image.merge("RGB", (gray, gray.point(lambda v: v // 2), gray.point(lambda v: v // 2)))
    blue = Image.merge("RGB", (gray.point(lambda v: v // 2), gray.point(lambda v: v // 2), gray))
    assert look([red, blue]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=5)), min_size=2, max_size=30))
def test_bands_miss_no_pair(members: list[tuple[int, set[int]]]) -> None:
    base = np.random.default_rng(0).integers(0, 2**63, 6, dtype=np.uint64)
    hashes = np.array([int(base[i]) ^ sum(1 << bit for bit in bits) for i, bits in members], dtype=np.uint64)
    found = {
        (min(a, b), max(a, b))
        for left, right in duplicates._candidates(hashes)
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    }
    pairs = [(i, j) for j in range(len(hashes)) for i in range(j)]
    assert found == {(i, j) for i, j in pairs if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 4}


def test_groups_are_linked_through_their_members() -> None:
    colours = np.zeros((4, 8, 8, 3), np.uint8)
    hashes = np.array([0, 0b1111, 0b11111111, 2**63 - 1], dtype=np.uint64)
    assert duplicates.near_groups(hashes, colours) == [[0, 1, 2]]
