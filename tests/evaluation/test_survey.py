"""What a set of pictures is before it is measured: converted silently nowhere, and one truth in a folder."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.evaluation import data_pictures
from carrara.evaluation.pictures import Size
from carrara.images import save_npz, save_png
from tests.errors import refused

RGB = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
IMAGE = Image.fromarray(RGB)


def animated(path: Path) -> None:
    IMAGE.save(path, save_all=True, append_images=[IMAGE.rotate(90)])


def deep_colour(path: Path) -> None:
    """A PNG of 16 bits a channel, which Pillow opens as RGB without a word; Pillow cannot write one."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (RGB.astype(">u2") * 257).reshape(8, -1)
    content = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


CONVERTED = {
    "16-bit gray": (lambda path: Image.fromarray(RGB[..., 0].astype(np.uint16) * 257).save(path), ".png", "16-bit"),
    "16-bit colour": (deep_colour, ".png", "16-bit"),
    "palette": (lambda path: IMAGE.quantize(8).save(path), ".png", "palette"),
    "CMYK": (lambda path: IMAGE.convert("CMYK").save(path), ".tif", "CMYK"),
    "animation": (animated, ".gif", "first frame"),
    "animated WebP": (animated, ".webp", "first frame"),
    "gray with alpha": (lambda path: IMAGE.convert("LA").save(path), ".png", "transparency"),
    "alpha": (lambda path: IMAGE.convert("RGBA").save(path), ".png", "laid on white"),
    "bilevel": (lambda path: IMAGE.convert("1").save(path), ".png", "1-bit"),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_every_conversion_is_named_with_its_number_and_files(tmp_path: Path, kind: str) -> None:
    write, ending, word = CONVERTED[kind]
    for index in range(2):
        write(tmp_path / f"odd{index}{ending}")
    IMAGE.save(tmp_path / "plain.png")
    notices = data_pictures(str(tmp_path), size=Size(channels=3)).notices
    assert any(word in line and "2 of 3" in line and f"odd0{ending}" in line for line in notices), notices


def test_plain_pictures_have_no_notice(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.png")
    IMAGE.save(tmp_path / "b.bmp")
    assert data_pictures(str(tmp_path)).notices == []


@pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".webp"])
def test_compression_with_loss_on_one_side_only_is_named(tmp_path: Path, ending: str) -> None:
    IMAGE.save(tmp_path / "a.png")
    IMAGE.save(tmp_path / f"b{ending}")
    (mixed,) = data_pictures(str(tmp_path)).notices
    assert f"b{ending}" in mixed
    (tmp_path / "lossy").mkdir()
    IMAGE.save(tmp_path / "lossy" / f"a{ending}")
    (tmp_path / "exact").mkdir()
    IMAGE.save(tmp_path / "exact" / "a.png")
    lossy, exact = (data_pictures(str(tmp_path / side)).survey for side in ("lossy", "exact"))
    assert lossy is not None
    assert exact is not None
    assert len(lossy.against("x", exact, "y")) == len(exact.against("y", lossy, "x")) == 1
    assert lossy.against("x", lossy, "y") == exact.against("x", exact, "y") == []


def test_a_picture_in_two_formats_is_named(tmp_path: Path) -> None:
    for ending in (".png", ".bmp"):
        IMAGE.save(tmp_path / f"a{ending}")
    (twice,) = data_pictures(str(tmp_path)).notices
    assert "two formats" in twice


# ---- samples and their archive ------------------------------------------------------------------------------


def samples(folder: Path, count: int, seed: int = 0) -> Path:
    """What `carrara sample` writes."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    for row, image in enumerate(images):
        save_png(image, folder / f"seed{seed}-{row:05d}.png")
    save_png(images[0], folder / "grid.png")
    save_npz(folder / "samples.npz", images)
    return folder


def test_a_folder_of_samples_has_one_truth(tmp_path: Path) -> None:
    folder = samples(tmp_path / "s", 3)
    assert data_pictures(str(folder)).count == 3
    (folder / "seed0-00002.png").unlink()
    with refused("conflict", str(folder / "samples.npz")):
        data_pictures(str(folder))
    (folder / "samples.npz").unlink()
    with refused("missing", str(folder / "samples.npz")):
        data_pictures(str(folder))
    (folder / "grid.png").unlink()
    assert data_pictures(str(folder)).count == 2


def edited(folder: Path) -> None:
    IMAGE.convert("L").save(folder / "seed0-00001.png")


def two_runs(folder: Path) -> None:
    """As many pictures as samples, but of another run."""
    for row in range(3):
        (folder / f"seed0-{row:05d}.png").unlink()
    other = samples(folder.parent / "other", 3, seed=1)
    for row in range(3):
        (other / f"seed1-{row:05d}.png").rename(folder / f"seed1-{row:05d}.png")


def other_names(folder: Path) -> None:
    """Pictures that no `sample` names so."""
    for row in range(3):
        (folder / f"seed0-{row:05d}.png").unlink()
        IMAGE.save(folder / f"{row}.jpg")


def below(folder: Path) -> None:
    (folder / "more").mkdir()
    IMAGE.save(folder / "more" / "a.png")


def cut(folder: Path) -> None:
    (folder / "seed0-00000.png").write_bytes(b"cut")


@pytest.mark.parametrize("change", [edited, two_runs, other_names, below, cut])
def test_pictures_that_are_not_the_archives_are_refused(tmp_path: Path, change: object) -> None:
    folder = samples(tmp_path / "s", 3)
    assert callable(change)
    change(folder)
    with refused("conflict", str(folder / "samples.npz")):
        data_pictures(str(folder))
    assert data_pictures(str(folder / "samples.npz")).count == 3
