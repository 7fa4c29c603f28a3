"""References: other programs' archives, round trips, the cache, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.errors import Code
from carrara.evaluation import (
    Moments,
    Pictures,
    Reference,
    collected_reference,
    evaluate,
    read_statistics,
    write_statistics,
)
from carrara.evaluation.features import Features, Pixels
from carrara.evaluation.pictures import Size, data_pictures
from tests.errors import refused


def moments(seed: int = 0) -> Moments:
    return Moments.of(torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def test_round_trip_is_exact_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "stats.npz"
    write_statistics(path, moments(), {"features": "pixels"})
    back = read_statistics(path, {"features": "pixels"})
    assert torch.equal(back.mean, moments().mean)
    assert torch.equal(back.covariance, moments().covariance)
    assert back.count == 50
    with np.load(path) as archive:  # as pytorch-fid and clean-fid open it
        assert archive["mu"].dtype == archive["sigma"].dtype == np.float64
        assert archive["mu"].shape == (6,)
        assert archive["sigma"].shape == (6, 6)
    assert [file.name for file in path.parent.iterdir()] == ["stats.npz"]


def test_adms_archive_gives_statistics_and_images(tmp_path: Path) -> None:
    path = tmp_path / "adm.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    known = moments()
    np.savez(
        path,
        mu=known.mean.float().numpy(),  # ADM's are float32
        sigma=known.covariance.numpy(),
        mu_s=np.zeros(3),
        sigma_s=np.eye(3),
        arr_0=pixels,
    )
    assert torch.equal(read_statistics(path).mean, known.mean.float().double())
    assert read_statistics(path).count is None


def test_other_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    write_statistics(path, moments(), {"features": "inception-2015", "preparation": "clean-fid"})
    with refused("mismatch", str(path)):
        read_statistics(path, {"features": "inception-2015", "preparation": "tensorflow"})


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"mean": np.zeros(3)}, "damaged"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shape"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "damaged"),
    ],
)
def test_archives_of_something_else_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]], code: Code
) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with refused(code, str(path)):
        read_statistics(path)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    with refused("missing", str(path)):
        read_statistics(path)
    write_statistics(path, moments())
    path.write_bytes(path.read_bytes()[:200])
    with refused("damaged", str(path)):
        read_statistics(path)
    path.write_bytes(b"")
    with refused("damaged", str(path)):
        read_statistics(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with refused("damaged", str(path)):
        read_statistics(path)


class Counted(Pixels):
    """Pixels that count how many pictures they were computed of."""

    checksum = "ab12"

    def __init__(self) -> None:
        self.pictures = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.pictures += len(images)
        return super().__call__(images)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARRARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def folder(path: Path, count: int, side: int = 4, seed: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for row, picture in enumerate(pixels):
        Image.fromarray(picture).save(path / f"{row:03}.png")
    return path


def collected(path: Path, features: Features, size: Size | None = None) -> Reference:
    return collected_reference(data_pictures(str(path), size=size), features)


@pytest.mark.parametrize(("count", "side"), [(60, 4), (20, 4), (5, 32)], ids=["covariance", "few", "large"])
def test_a_repeated_evaluation_computes_no_reference(tmp_path: Path, cache: Path, count: int, side: int) -> None:
    real, samples = folder(tmp_path / "a", count, side), data_pictures(str(folder(tmp_path / "b", 12, side, 1)))
    counted = Counted()
    results = [evaluate(samples, collected(real, counted), Pixels()).metrics for _ in range(2)]
    assert counted.pictures == count
    assert results[0] == results[1]  # bit for bit
    assert len(list(cache.iterdir())) == 1


def test_whatever_decides_the_features_makes_another_entry(tmp_path: Path, cache: Path) -> None:
    real, counted = folder(tmp_path / "a", 6), Counted()
    first = collected(real, counted)
    stat = (real / "003.png").stat()
    (real / "003.png").write_bytes(folder(tmp_path / "b", 6, seed=1).joinpath("003.png").read_bytes())
    os.utime(real / "003.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = collected(real, counted)  # same names and times, one other picture
    assert counted.pictures == 12
    assert changed.content != first.content
    (real / "005.png").unlink()
    collected(real, counted)
    collected(real, counted, Size((2, 2)))
    collected(real, counted, Size(channels=1))
    counted.checksum = "cd34"
    collected(real, counted)
    assert counted.pictures == 12 + 4 * 5
    assert len(list(cache.iterdir())) == 6


def test_what_has_no_identity_is_not_cached(tmp_path: Path, cache: Path) -> None:
    unknown = type("Own", (), {"name": "own", "checksum": "", "preparation": "", "__call__": Pixels.__call__})()
    collected(folder(tmp_path / "a", 6), unknown)
    made = Pictures("made", 6, lambda rows: torch.rand(len(rows), 3, 4, 4))
    collected_reference(made, Counted())
    assert not cache.exists()


def test_a_damaged_entry_and_a_cache_that_is_not_writable_cost_time_only(tmp_path: Path, cache: Path) -> None:
    real, counted = folder(tmp_path / "a", 6), Counted()
    first = collected(real, counted)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert torch.equal(collected(real, counted).statistics.covariance, first.statistics.covariance)
    assert counted.pictures == 12
    entry.unlink()
    cache.rmdir()
    cache.write_text("a file")
    collected(real, counted)
    assert counted.pictures == 18
