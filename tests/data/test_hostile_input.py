"""Input that used to cost memory, hang, or give wrong classes without a word."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carrara.data import Preprocess, open_source
from tests.data.builders import files, folder
from tests.errors import refused


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1), (3, 6000)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_strip_costs_no_more_than_a_picture(size: tuple[int, int], crop: str) -> None:
    strip = Image.new("RGB", size, (9, 200, 30))
    tracemalloc.start()
    kept = Preprocess(32, 32, crop=crop).resized(strip)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.numel() <= 3 * 32 * 32 * (1 if crop == "center" else 32)
    assert peak < 2e6, "the whole strip enlarged is 6 to 18 MB"
    assert (kept.flatten(1).numpy() == np.array([[9], [200], [30]])).all()


def test_a_strip_gives_the_pixels_of_the_whole_strip_enlarged() -> None:
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 300, 3), dtype=np.uint8))
    whole = np.asarray(strip.resize((1200, 8), Image.Resampling.BICUBIC)).astype(int)[:, 596:604]
    part = Preprocess(8, 8).resized(strip).permute(1, 2, 0).numpy()
    assert np.abs(part - whole).max() <= 1, "only the order of rounding may differ"


@pytest.mark.parametrize("labels", [None, np.empty(0, np.int64), np.empty(0, "U1")])
def test_an_npz_of_no_images(tmp_path: Path, labels: np.ndarray | None) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, np.empty((0, 8, 8, 3), np.uint8), *([] if labels is None else [labels]))
    with refused("missing", key=str(path)):
        open_source(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_an_unreadable_picture(tmp_path: Path) -> None:
    os.mkfifo(folder(tmp_path, files(3)) / "x.png")
    source = open_source(tmp_path)
    with refused("damaged", key="x.png"):
        source[3]


@pytest.mark.parametrize("target", ["x.png", "y.png"])
def test_links_in_a_circle_are_unreadable_pictures(tmp_path: Path, target: str) -> None:
    os.symlink(target, folder(tmp_path, files(3)) / "x.png")
    if target != "x.png":
        os.symlink("x.png", tmp_path / "y.png")
    source = open_source(tmp_path)
    with refused("damaged", key="x.png"):
        source[3]
