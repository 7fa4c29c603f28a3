"""Pixels at the edge: rounding, grids, PNG with metadata, npz."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carrara import images
from tests.errors import refused


def test_every_8_bit_value_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(images.to_uint8(images.from_uint8(pixels)), pixels)


def test_values_are_rounded_and_clamped_not_truncated() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 6)
    assert images.to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]


def test_the_seventeen_levels_of_the_digits_stay_apart() -> None:
    levels = torch.arange(17) / 8 - 1
    assert len(images.to_uint8(levels.reshape(1, 1, 1, 17)).unique()) == 17


def test_grid_places_row_by_row() -> None:
    x = torch.stack([torch.full((1, 2, 2), i / 10) for i in range(5)])
    sheet = images.grid(x, columns=3)
    assert sheet.shape == (1, 5, 8)
    assert sheet[0, 3, 3] == pytest.approx(0.4)
    assert sheet[0, 4, 7] == 1.0, "what no image covers is white"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_keeps_pixels_and_metadata(tmp_path: Path, channels: int) -> None:
    x = images.from_uint8(torch.randint(0, 256, (1, 4, 5, channels), dtype=torch.uint8))[0]
    images.save_png(x, tmp_path / "x.png", {"seed": 3})
    with Image.open(tmp_path / "x.png") as picture:
        assert json.loads(picture.info["carrara"]) == {"seed": 3}
        array = np.asarray(picture).reshape(4, 5, channels)
    assert np.array_equal(array, images.to_uint8(x[None])[0].numpy())


def test_two_channels_cannot_be_shown() -> None:
    with refused("shape", key="image"):
        images.to_pil(torch.zeros(2, 4, 4))


def test_npz_is_what_adm_reads_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    x = torch.zeros(3, 1, 8, 8)
    images.save_npz(tmp_path / "a.npz", x, [1, 2, 3])
    images.save_npz(tmp_path / "b.npz", x, [1, 2, 3])
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 1)
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [1, 2, 3]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
