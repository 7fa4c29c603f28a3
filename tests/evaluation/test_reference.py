"""Statistics on disk: other programs' archives, round trips, the cache, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from carrara.errors import UserError
from carrara.evaluation import Moments, cached_statistics, read_images, read_statistics, write_statistics
from carrara.images import save_npz, to_uint8


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
    images, labels = read_images(path)
    assert labels is None
    assert images.shape == (5, 3, 4, 4)
    assert np.array_equal(to_uint8(images).numpy(), pixels)


def test_samples_are_read_back_as_written(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (7, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    save_npz(tmp_path / "samples.npz", images, [0, 1, 2, 3, 4, 5, 6])
    back, labels = read_images(tmp_path / "samples.npz")
    assert torch.equal(back, images)
    assert labels is not None
    assert labels.tolist() == list(range(7))


def test_other_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    write_statistics(path, moments(), {"features": "inception-2015", "preparation": "clean-fid"})
    with pytest.raises(UserError, match="was taken with preparation 'clean-fid', not 'tensorflow'"):
        read_statistics(path, {"features": "inception-2015", "preparation": "tensorflow"})


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mean": np.zeros(3)}, "not 'mu' and 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu of shape \[3\] and sigma of \[4, 4\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN"),
    ],
)
def test_archives_of_something_else_are_told(
    tmp_path: Path, arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]], sentence: str
) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        read_statistics(path)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(UserError, match="there is no file"):
        read_statistics(path)
    write_statistics(path, moments())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"not a whole \.npz"):
        read_statistics(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"not a whole \.npz"):
        read_images(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="plain arrays"):
        read_statistics(path)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.float32), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_images_of_another_type_or_shape_are_refused(
    tmp_path: Path, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    with pytest.raises(UserError, match="arr_0 of type"):
        read_images(tmp_path / "x.npz")


def test_the_cache_computes_once_per_content(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> Moments:
        calls.append(1)
        return moments(len(calls))

    key = {"data": "ab12", "features": "pixels"}
    first = cached_statistics(key, compute, tmp_path)
    again = cached_statistics(dict(reversed(key.items())), compute, tmp_path)
    assert len(calls) == 1
    assert torch.equal(first.covariance, again.covariance)
    assert again.count == 50
    other = cached_statistics({**key, "data": "cd34"}, compute, tmp_path)
    assert len(calls) == 2
    assert not torch.equal(first.mean, other.mean)


def test_a_cut_cache_entry_is_taken_again(tmp_path: Path) -> None:
    key = {"data": "ab12"}
    first = cached_statistics(key, moments, tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert torch.equal(cached_statistics(key, moments, tmp_path).covariance, first.covariance)
