"""What samples are compared with: real pictures, their features cached by content, or a file of their statistics.

The `.npz` files of ADM, pytorch-fid and clean-fid contain `mu` [D] and `sigma` [D, D]; ADM's contain some of the images
as well (`arr_0` uint8 [N, H, W, C]). What Carrara writes has in addition, under `protocol`, the features, the images
and how many.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from carrara.distributed import run_on_rank0
from carrara.errors import UserError
from carrara.evaluation.collect import ROWS, Collected, collect_together
from carrara.evaluation.features import Features, Pixels
from carrara.evaluation.features.checksum import file_checksum
from carrara.evaluation.moments import Moments, Statistics
from carrara.evaluation.pictures import Pictures
from carrara.evaluation.stamp import versions
from carrara.files import read_arrays

Progress = Callable[[int], None]
"""Called after each batch with how many pictures it contains."""


@dataclass(frozen=True)
class Reference:
    """The real pictures, or what a file contains of their statistics.

    Attributes:
        statistics: mean and covariance of their features.
        images: their features, where pictures are at hand.
        name, split, resize: as of `Pictures`.
        content: hash of the pictures, or of the file of statistics.
        labels: the name of the class of each row of `images`, or None.
        pictures: the pictures themselves, to show one; None where only statistics are known.
        notices: what a user should know of the file.
    """

    statistics: Statistics
    images: Collected | None
    name: str
    content: str
    split: str = ""
    resize: str = ""
    labels: list[str] | None = None
    pictures: Pictures | None = None
    notices: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """How many pictures; None where a statistics file does not contain it."""
        return self.statistics.count


# ---- statistics on disk -----------------------------------------------------------------------------------


def write_statistics(
    path: str | Path, statistics: Statistics | Moments, protocol: Mapping[str, Any] | None = None
) -> None:
    """Writes `mu` and `sigma` (float64), readable by pytorch-fid and clean-fid, whole or not at all.

    Args:
        protocol: what they were computed from; `features`, `features_checksum` and `preparation` are checked when
            the file is read for other features.
    """
    if isinstance(statistics, Moments):
        statistics = statistics.statistics()
    about = json.dumps({**(protocol or {}), "count": statistics.count}, sort_keys=True)
    _save(Path(path), mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy(), protocol=np.array(about))


def _save(path: Path, **arrays: Any) -> None:
    """Write an archive that is there whole or not at all, also where several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_statistics(path: str | Path, expected: Mapping[str, Any] | None = None) -> Statistics:
    """Mean and covariance of an `.npz` of ADM, pytorch-fid, clean-fid or Carrara.

    Args:
        expected: the protocol by which they must have been computed (`features`, `features_checksum`,
            `preparation`, …), compared where the file contains it; other programs' files do not.

    Raises:
        UserError: no such file, not an archive, no `mu` and `sigma`, shapes that do not fit, NaN, or other features.
    """
    path = Path(path)
    arrays = read_arrays(path)
    if "mu" not in arrays or "sigma" not in arrays:
        raise UserError(
            f"'{path}' contains {sorted(arrays)}, not 'mu' and 'sigma': it is no statistics file.",
            key=str(path),
            code="damaged",
        )
    for name in ("mu", "sigma"):
        if arrays[name].dtype.kind not in "fiu":
            raise UserError(
                f"'{path}' has {name} of type {arrays[name].dtype}, where real numbers are needed.",
                key=str(path),
                code="damaged",
            )
    mean, covariance = torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double()
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"'{path}' has mu of shape {list(mean.shape)} and sigma of {list(covariance.shape)}.",
            key=str(path),
            code="shape",
        )
    _check_covariance(path, mean, covariance)
    about = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
    for name, value in (expected or {}).items():
        if name in about and about[name] != value:
            raise UserError(
                f"'{path}' was computed with {name} {about[name]!r}, not {value!r}: "
                "compute the reference again with the features in use.",
                key=str(path),
                code="mismatch",
            )
    return Statistics(mean, covariance, about.get("count"))


def _check_covariance(path: Path, mean: Tensor, covariance: Tensor) -> None:
    """Raises UserError unless a mean and a covariance can be those of numbers: finite, symmetric, and no entry beyond
    what the two variances allow, up to the rounding of float32."""
    largest = float(covariance.abs().max())
    deviations = covariance.diagonal().clamp(min=0).sqrt()
    checks = {
        "NaN or infinite numbers": not bool(mean.isfinite().all() and covariance.isfinite().all()),
        "a negative variance": bool((covariance.diagonal() < -1e-6 * largest).any()),
        "a sigma that is not symmetric": bool(((covariance - covariance.T).abs() > 1e-5 * largest).any()),
        "covariances beyond what their variances allow": bool(
            (covariance.abs() > deviations[:, None] * deviations * 1.001 + 1e-5 * largest).any()
        ),
    }
    wrong = next((words for words, found in checks.items() if found), None)
    if wrong is not None:
        raise UserError(f"'{path}' has {wrong}: compute the statistics again.", key=str(path), code="damaged")


# ---- references --------------------------------------------------------------------------------------------


def holds(path: str, *names: str) -> bool:
    """Whether a file is an `.npz` with arrays of these names."""
    if not (path.endswith(".npz") and Path(path).is_file()):
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return set(names) <= set(archive.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError):
        return False  # whoever reads its images names the reason


def holds_statistics(path: str) -> bool:
    """Whether a file has `mu` and `sigma`, as the references of ADM, pytorch-fid and clean-fid."""
    return holds(path, "mu", "sigma")


def holds_images(path: str) -> bool:
    """Whether a file has images, as ADM's references have in addition to their statistics."""
    return holds(path, "arr_0")


def statistics_reference(path: str, features: Features, images: Reference | None = None) -> Reference:
    """A reference of which mean and covariance are known and, in ADM's files, some of the pictures.

    The Fréchet distance takes the statistics, which are of the whole set, the metrics of pairs the pictures.
    Where the statistics are of other features than the ones in use, pictures serve for everything.

    Args:
        images: the pictures in the same file.

    Raises:
        UserError: the file is damaged, or was computed from other features.
    """
    statistics = read_statistics(path, features_of(features))
    notices: tuple[str, ...] = ()
    if holds(path, "mu_s", "sigma_s"):
        notices += (f"{path} contains statistics of sFID, too (mu_s, sigma_s), of other features: they are not used.",)
    if images is None:
        return Reference(statistics, None, path, file_checksum(path), notices=notices)
    dimension = len(images.statistics.mean)
    if len(statistics.mean) != dimension:
        notices += (
            f"{path} contains statistics of {len(statistics.mean)} dimensions, the features '{features.name}' have "
            f"{dimension}: its {images.count:,} images are the reference instead.",
        )
        statistics = images.statistics
    content = file_checksum(path)
    return replace(images, statistics=statistics, name=path, content=content, split="", notices=notices)


def collected_reference(
    pictures: Pictures,
    features: Features,
    rows: int = ROWS,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Reference:
    """The features of real pictures, of the first `rows` of them one by one; from the cache where they are there.

    Args:
        device: where the features are computed, which decides their last digits.
    """
    key = _cache_key(pictures, features, rows, str(device))
    collected = None if key is None else run_on_rank0(lambda: _cached(key))
    if collected is None:
        collected = collect_together(pictures, features, rows, progress=progress)
        if key is not None:
            run_on_rank0(lambda: _keep(key, collected))
    elif progress is not None:
        progress(pictures.count)
    labels = None if pictures.labels is None else pictures.labels[: len(collected.rows)]
    return Reference(
        collected.statistics,
        collected,
        pictures.name,
        collected.content,
        pictures.split,
        pictures.resize,
        labels,
        pictures,
    )


def features_of(features: Features) -> dict[str, Any]:
    """What stamps and statistics files contain of a feature network."""
    return {
        "features": features.name,
        "features_checksum": features.checksum,
        "preparation": features.preparation,
    }


# ---- the cache ----------------------------------------------------------------------------------------------

CACHED = 2**30
"""Bytes of the largest entry."""


def _cache_key(pictures: Pictures, features: Features, rows: int, device: str) -> str | None:
    """A hash of everything that decides the features of pictures, so that no entry goes stale: every byte of the files
    in their order, how they are read, the features with the checksum of their weights, and the programs.

    None where that is not known: pictures that are made, a feature network without a checksum of its own.
    """
    if pictures.survey is None or pictures.reading is None or not (features.checksum or isinstance(features, Pixels)):
        return None
    about: dict[str, Any] = {
        "bytes": pictures.survey.digest,
        "reading": pictures.reading,
        "batch_size": pictures.batch_size,
        "rows": rows,
        "device": device.split(":")[0],
        "versions": {**versions(), "numpy": np.__version__, "pillow": PIL.__version__},
        **features_of(features),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """`$CARRARA_CACHE`, or `carrara` in the user's cache folder, and in it `references`."""
    return Path(os.environ.get("CARRARA_CACHE") or Path.home() / ".cache" / "carrara") / "references"


def _cached(key: str) -> Collected | None:
    path = cache_folder() / f"{key}.npz"
    try:
        found = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
        statistics = Statistics(found["mean"], found.get("covariance"), int(found["count"]), factor=found.get("factor"))
        content = bytes(found["content"].tolist()).hex()
        return Collected(statistics, found["rows"], tuple(found["shape"].tolist()), content, found["first"])
    except (UserError, KeyError, TypeError, ValueError):
        return None  # not there, or cut short by a full disk or a kill: computed again


def _keep(key: str, collected: Collected) -> None:
    """Write an entry, unless it is too large or the place is not writable, which costs time and nothing else."""
    statistics = collected.statistics
    part = {"factor": statistics.factor} if statistics.wide else {"covariance": statistics.covariance}
    tensors = {"mean": statistics.mean, "rows": collected.rows, "first": collected.first, **part}
    if sum(tensor.nbytes for tensor in tensors.values()) > CACHED:
        return
    with contextlib.suppress(OSError):
        _save(
            cache_folder() / f"{key}.npz",
            **{name: tensor.numpy() for name, tensor in tensors.items()},
            count=np.array(statistics.count),
            shape=np.array(collected.shape),
            content=np.frombuffer(bytes.fromhex(collected.content), dtype=np.uint8),
        )
