"""Resize, crop and flip, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carrara.data import Preprocess
from carrara.errors import Code
from tests.data.builders import picture, pixels
from tests.errors import refused

SIDES = st.integers(1, 40)


@given(height=SIDES, width=SIDES, to_height=SIDES, to_width=SIDES, channels=st.sampled_from([1, 3, 4]))
def test_any_size_becomes_the_given_size(height: int, width: int, to_height: int, to_width: int, channels: int) -> None:
    result = Preprocess(to_height, to_width, channels)(picture(0, height, width))
    assert result.shape == (channels, to_height, to_width)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()


def test_the_right_size_is_untouched() -> None:
    result = Preprocess(12, 12)(picture(4))
    assert np.array_equal(result.permute(1, 2, 0).numpy(), pixels(4))


def test_adm_halves_by_boxes_then_bicubic() -> None:
    image = picture(1, 50, 70)
    halved = image.resize((35, 25), Image.Resampling.BOX)
    halved = halved.resize((17, 12), Image.Resampling.BOX)
    fitted = halved.resize((round(17 * 9 / 12), 9), Image.Resampling.BICUBIC)
    left = (fitted.width - 9) // 2
    expected = np.asarray(fitted)[:, left : left + 9]
    assert np.array_equal(Preprocess(9, 9)(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "box", "nearest"])
def test_named_filters_are_pillows(name: str) -> None:
    image = picture(2, 30, 30)
    expected = np.asarray(image.resize((10, 10), Image.Resampling[name.upper()]))
    result = Preprocess(10, 10, resize=name)(image)  # type: ignore[arg-type]
    assert np.array_equal(result.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("draw", "top", "left"), [((0, 0, 0), 0, 0), ((0.999, 0.999, 0), 4, 8), ((0.5, 0.5, 0), 2, 4)])
def test_random_crop_follows_the_draw(draw: tuple[float, float, float], top: int, left: int) -> None:
    prepare = Preprocess(8, 8, resize="box", crop="random")
    whole = torch.from_numpy(pixels(1, 12, 16)).permute(2, 0, 1)
    assert torch.equal(prepare.cut(whole, draw), whole[:, top : top + 8, left : left + 8])


def test_random_crop_reaches_every_place_equally() -> None:
    prepare = Preprocess(8, 8, crop="random")
    whole = torch.arange(11, dtype=torch.uint8).expand(1, 8, 11)
    places = [int(prepare.cut(whole, (0.0, (i + 0.5) / 400, 0.9))[0, 0, 0]) for i in range(400)]
    assert np.bincount(places).tolist() == [100, 100, 100, 100]


def test_flip_is_off_by_default() -> None:
    image = picture(1)
    straight = Preprocess(12, 12)(image, (0, 0, 0.1))
    assert torch.equal(straight, Preprocess(12, 12)(image))
    flipping = Preprocess(12, 12, flip=True)
    assert torch.equal(flipping(image, (0, 0, 0.1)), straight.flip(-1))
    assert torch.equal(flipping(image, (0, 0, 0.6)), straight)
    assert torch.equal(flipping(image), straight)


def test_transparency_lies_on_white_unless_kept() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert Preprocess(4, 4, 3)(image).unique().tolist() == [255]
    assert Preprocess(4, 4, 1)(image).unique().tolist() == [255]
    assert Preprocess(4, 4, 4)(image)[3].unique().tolist() == [0]


def test_hidden_colour_does_not_bleed_when_shrunk() -> None:
    # Transparent red next to opaque blue: a filter on plain RGBA would tint the edge purple.
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 8))
    result = Preprocess(2, 2, 4, resize="bicubic")(image)
    # 2 levels: rounding of the premultiplied values.
    assert int(result[0][result[3] > 32].max()) <= 2


def test_the_sentence_tells_all_choices() -> None:
    text = Preprocess(32, 48, 1, resize="lanczos", crop="random", flip=True).describe()
    for word in ("L,", "lanczos", "32×48", "random crop", "flipped"):
        assert word in text
    assert "shorter side" in text


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        ({"height": 0}, "invalid", "data.resolution"),
        ({"channels": 2}, "invalid", "data.channels"),
        ({"resize": "bicubik"}, "unknown", "data.resize"),
        ({"crop": "centre"}, "unknown", "data.crop"),
    ],
)
def test_impossible_choices_are_refused(arguments: dict[str, object], code: Code, key: str) -> None:
    with refused(code, key=key):
        Preprocess(**{"height": 8, "width": 8, **arguments})  # type: ignore[arg-type]
