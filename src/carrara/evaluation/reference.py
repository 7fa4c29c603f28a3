"""Reference statistics on disk: the `.npz` files of ADM, pytorch-fid and clean-fid, and a cache by content.

All three keep `mu` [D] and `sigma` [D, D]; ADM's hold some of the images besides (`arr_0` uint8 [N, H, W, C]).
What Carrara writes says more, under `protocol`: of which features, of which images, how many.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.moments import Moments, Statistics
from carrara.files import read_arrays


def write_statistics(
    path: str | Path, statistics: Statistics | Moments, protocol: Mapping[str, Any] | None = None
) -> None:
    """Writes `mu` and `sigma` (float64), readable by pytorch-fid and clean-fid, whole or not at all.

    Args:
        protocol: what they were taken of; `features`, `features_checksum` and `preparation` are checked when
            the file is read for other features.
    """
    path = Path(path)
    if isinstance(statistics, Moments):
        statistics = statistics.statistics()
    about = {**(protocol or {}), "count": statistics.count}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            protocol=np.array(json.dumps(about, sort_keys=True)),
        )
    os.replace(partial, path)


def read_statistics(path: str | Path, expected: Mapping[str, Any] | None = None) -> Statistics:
    """Mean and covariance of an `.npz` of ADM, pytorch-fid, clean-fid or Carrara.

    Args:
        expected: the protocol they must have been taken by (`features`, `features_checksum`, `preparation`,
            …), compared where the file says; other programs' files say nothing.

    Raises:
        UserError: no such file, not an archive, no `mu` and `sigma`, shapes that do not fit, NaN, or other features.
    """
    path = Path(path)
    arrays = read_arrays(path)
    if "mu" not in arrays or "sigma" not in arrays:
        raise UserError(f"'{path}' holds {sorted(arrays)}, not 'mu' and 'sigma': it is no statistics file.")
    for name in ("mu", "sigma"):
        if arrays[name].dtype.kind not in "fiu":
            raise UserError(
                f"'{path}' has {name} of type {arrays[name].dtype}, where real numbers are needed.",
                key=str(path),
                code="damaged",
            )
    mean, covariance = torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double()
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"'{path}' has mu of shape {list(mean.shape)} and sigma of {list(covariance.shape)}.")
    _check_covariance(path, mean, covariance)
    about = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
    for name, value in (expected or {}).items():
        if name in about and about[name] != value:
            raise UserError(
                f"'{path}' was taken with {name} {about[name]!r}, not {value!r}: "
                "compute the reference again with the features in use."
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


def read_images(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """The images of an `.npz` of samples: `arr_0` uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1], and the
    labels `arr_1` int64 [N] where there are any.

    Raises:
        UserError: no such file, no images, or images of another type or shape.
    """
    from carrara.images import from_uint8

    path = Path(path)
    arrays = read_arrays(path)
    pixels = arrays.get("arr_0")
    if pixels is None:
        raise UserError(f"'{path}' holds {sorted(arrays)}, no images 'arr_0': give an archive of samples.")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3, 4) or len(pixels) == 0:
        raise UserError(
            f"'{path}' has arr_0 of type {pixels.dtype} and shape {list(pixels.shape)}: images are uint8 [N, H, W, C]."
        )
    labels = arrays.get("arr_1")
    return from_uint8(torch.from_numpy(pixels)), None if labels is None else torch.from_numpy(labels).long()


def cached_statistics(
    key: Mapping[str, Any], compute: Callable[[], Moments], folder: str | Path | None = None
) -> Statistics:
    """The statistics that belong to `key`, computed once.

    Args:
        key: everything that decides them: the data's content hash, its preprocessing, the features with
            checksum and preparation. Another value anywhere is another entry, so nothing goes stale.
        compute: takes them, where the cache has none.
        folder: by default `$CARRARA_CACHE` or `~/.cache/carrara`, under `statistics`.
    """
    text = json.dumps(dict(key), sort_keys=True)
    home = Path(os.environ.get("CARRARA_CACHE", Path.home() / ".cache" / "carrara")) / "statistics"
    path = Path(folder or home) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
    if path.is_file():
        try:
            return read_statistics(path)
        except UserError:
            path.unlink()  # cut short by a full disk or a kill; taken again
    statistics = compute().statistics()
    write_statistics(path, statistics, key)
    return statistics
