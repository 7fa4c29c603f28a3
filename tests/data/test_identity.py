"""What a run notices of changed data, and what it does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from carrara.data import open_source
from carrara.data.identity import SAMPLED, identity
from tests.data.builders import files, folder, picture, zipped


def classes(root: Path, count: int = 12) -> Path:
    half = count // 2
    return folder(root, files(half, "a/{:03d}.png") | files(count - half, "b/{:03d}.png"))


def changed(before: dict[str, int | str], path: Path) -> set[str]:
    return {key for key, value in identity(open_source(path, unreadable_limit=1.0)).items() if value != before[key]}


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "one more": (
        lambda path: picture(99).save(path / "b" / "9.png"),
        {"number of images", "bytes of images", "names of images", "labels", "content of images"},
    ),
    "renamed": (lambda path: (path / "a" / "001.png").rename(path / "a" / "0010.png"), {"names of images"}),
    "of another class": (
        lambda path: (path / "b" / "000.png").rename(path / "a" / "006.png"),
        {"names of images", "labels"},
    ),
    "another picture": (lambda path: picture(99).save(path / "a" / "000.png"), {"content of images"}),
    "unreadable": (lambda path: (path / "a" / "000.png").write_bytes(b""), {"bytes of images", "content of images"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed_by_what_they_are(change: str, tmp_path: Path) -> None:
    path = classes(tmp_path / "data")
    before = identity(open_source(path))
    make, expected = CHANGES[change]
    make(path)
    # two pictures of equal size as PNG are a matter of luck
    assert changed(before, path) - {"bytes of images"} == expected - {"bytes of images"}


def test_a_folder_that_was_moved_is_the_same(tmp_path: Path) -> None:
    path = classes(tmp_path / "data")
    before = identity(open_source(path))
    shutil.move(path, tmp_path / "elsewhere")
    assert not changed(before, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["0.txt", "1.txt"])
def test_captions_count(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path, {f"{i}.png": picture(i).tobytes() for i in range(2)} | {"0.txt": "one", "1.txt": "two"})
    before = identity(open_source(path))
    (path / name).write_text("six")
    assert changed(before, path) == {"content of images"}


def test_of_many_images_the_content_of_a_sample_is_read(tmp_path: Path) -> None:
    path = folder(tmp_path, {f"{i:03d}.png": bytes([i]) for i in range(200)})
    before = identity(open_source(path))
    seen = []
    for number in range(200):
        (path / f"{number:03d}.png").write_bytes(b"\xff")
        seen += [number] * (changed(before, path) == {"content of images"})
        (path / f"{number:03d}.png").write_bytes(bytes([number]))
    assert len(seen) == SAMPLED
    assert (seen[0], seen[-1]) == (0, 199)
    assert np.ptp(np.diff(seen)) <= 1  # evenly spaced


def test_archives_and_arrays_have_one_too(tmp_path: Path) -> None:
    pixels = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    before = identity(open_source(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", arr_0=pixels[::-1])
    assert changed(before, tmp_path / "a.npz") == {"content of images"}
    zipped(tmp_path / "a.zip", files(4))
    before = identity(open_source(tmp_path / "a.zip"))
    zipped(tmp_path / "a.zip", files(5))
    assert "number of images" in changed(before, tmp_path / "a.zip")
