"""Pairs of pictures: who is compared with whom, and what is not comparable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from carrara.evaluation import Pictures, data_pictures, likeness, reconstruction
from carrara.images import save_npz, save_png
from tests.errors import refused

COUNT = 12
IMAGES = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def folder(path: Path, pattern: str, images: Tensor = IMAGES) -> Pictures:
    for index, image in enumerate(images):
        save_png(image, path / pattern.format(index))
    return data_pictures(str(path))


@pytest.mark.parametrize("name", ["{:04}.png", "x-{:02}.png", "{:03}_out.png", "class{0}/{0:03}.png", "{}.bmp"])
def test_equal_numbers_are_paired_in_whatever_order_names_sort(tmp_path: Path, name: str) -> None:
    plain, other = folder(tmp_path / "a", "{}.png"), folder(tmp_path / "b", "{}.png")
    for index in range(COUNT):
        target = tmp_path / "c" / name.format(index)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(tmp_path / "b" / f"{index}.png") as picture:
            picture.save(target)
    renamed = data_pictures(str(tmp_path / "c"))
    for pictures, originals in ((plain, renamed), (renamed, plain), (plain, other)):
        metrics = reconstruction(pictures, originals)
        assert metrics["ssim"].value == pytest.approx(1)
        assert metrics["psnr"].value == 100


def test_an_archive_is_paired_with_a_folder_by_number(tmp_path: Path) -> None:
    plain = folder(tmp_path / "a", "{}.png")
    save_npz(tmp_path / "b.npz", IMAGES)
    assert reconstruction(plain, data_pictures(str(tmp_path / "b.npz")))["psnr"].value == 100


def test_equal_names_are_paired_before_equal_numbers(tmp_path: Path) -> None:
    """The last number of all names is 1: only the stems differ, and sort differently with other endings."""
    first = {"a-1.png": 0, "a-b1.png": 1, "a_1.png": 2}
    for name, index in first.items():
        save_png(IMAGES[index], tmp_path / "x" / name)
        with Image.open(tmp_path / "x" / name) as picture:
            (tmp_path / "y").mkdir(exist_ok=True)
            picture.save(tmp_path / "y" / name.replace("a-1.png", "a-1.tiff"))
    pictures, originals = (data_pictures(str(tmp_path / side)) for side in "xy")
    assert reconstruction(pictures, originals)["psnr"].value == 100


@pytest.mark.parametrize("start", [1, 5])
def test_names_of_which_only_some_fit_are_refused(tmp_path: Path, start: int) -> None:
    pictures = folder(tmp_path / "a", "{:03}.png")
    for index, image in enumerate(IMAGES):
        save_png(image, tmp_path / "b" / f"{index + start:03}.png")
        save_png(image, tmp_path / "c" / f"other{index + start}.png")
    for side in "bc":
        with refused("mismatch", str(tmp_path / "a")):
            reconstruction(pictures, data_pictures(str(tmp_path / side)))


def test_names_without_anything_in_common_are_paired_in_order_with_a_warning(tmp_path: Path) -> None:
    for index, letter in enumerate("pqr"):
        save_png(IMAGES[index], tmp_path / "a" / f"{letter}.png")
        save_png(IMAGES[index], tmp_path / "b" / f"photo-{letter}{letter}.png")
    warnings: list[str] = []
    pictures, originals = (data_pictures(str(tmp_path / side)) for side in "ab")
    assert reconstruction(pictures, originals, warn=warnings.append)["psnr"].value == 100
    assert len(warnings) == 1
    assert "p.png" in warnings[0]
    assert "photo-pp.png" in warnings[0]


@pytest.mark.parametrize("kind", ["gif", "webp", "cmyk"])
def test_pictures_that_reading_changes_are_not_compared(tmp_path: Path, kind: str) -> None:
    pictures = folder(tmp_path / "a", "{}.png", IMAGES[:2])
    frames = [Image.effect_noise((16, 16), 50 + index).convert("RGB") for index in range(3)]
    (tmp_path / "b").mkdir()
    for index in range(2):
        path = tmp_path / "b" / f"{index}.{'jpg' if kind == 'cmyk' else kind}"
        if kind == "cmyk":
            frames[0].convert("CMYK").save(path)
        else:
            frames[0].save(path, save_all=True, append_images=frames[1:])
    changed = data_pictures(str(tmp_path / "b"), size=None)
    for sides in ((pictures, changed), (changed, pictures)):
        with refused("unsupported", "0." + ("jpg" if kind == "cmyk" else kind)):
            reconstruction(*sides)


def test_a_learned_distance_in_train_mode_is_measured_in_evaluation_mode() -> None:
    x, y = IMAGES[:2], IMAGES[2:4]

    class Distance(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            values: Tensor = self.dropout((x - y).square().flatten(1))
            return values.sum(1)

    random = Distance().train()
    assert torch.equal(likeness(x, y, random)["lpips"], likeness(x, y, random)["lpips"])
    assert random.training
    assert random.dropout.training
