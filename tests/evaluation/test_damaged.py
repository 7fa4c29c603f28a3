"""Numbers that are none, files that are not what they seem: refused by name, and JSON that stays JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carrara.evaluation import kernel_distance
from carrara.evaluation.collect import collect_together
from carrara.evaluation.features import Pixels
from carrara.evaluation.manifold import density_coverage, precision_recall
from carrara.evaluation.moments import LARGEST, Moments
from carrara.evaluation.pictures import Pictures
from carrara.evaluation.reference import read_statistics
from carrara.evaluation.stamp import Measurement, Stamp, from_json, load, to_json
from carrara.similarity import psnr
from tests.errors import refused

ROOM = np.random.default_rng(0)
REAL = np.cov(ROOM.normal(size=(50, 4)), rowvar=False)


@pytest.mark.parametrize(
    "sigma",
    [
        -REAL,
        REAL + np.triu(np.ones((4, 4)), 1),
        REAL + 1j * np.eye(4),
        REAL + 10 * (1 - np.eye(4)),
        np.where(np.eye(4) > 0, np.nan, REAL),
        REAL.astype(str),
    ],
    ids=["negative", "asymmetric", "complex", "correlations above 1", "nan", "text"],
)
def test_statistics_that_are_none_are_refused(tmp_path: Path, sigma: Any) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, mu=np.zeros(4), sigma=sigma)
    with refused("damaged", str(path)):
        read_statistics(path)


def test_statistics_in_float32_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(4, dtype=np.float32), sigma=REAL.astype(np.float32))
    assert read_statistics(tmp_path / "s.npz").covariance.shape == (4, 4)


def test_an_equal_pair_leaves_a_mean_finite() -> None:
    x = torch.rand(3, 1, 8, 8)
    values = psnr(x, torch.stack([x[0], -x[1], x[2]]))
    assert values.isfinite().all()
    assert values[0] == values[2] > values[1]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_null_in_json(value: float) -> None:
    text = to_json({"x": Measurement(value, None, Stamp(n=1), details={"terms": [value, 1.0]})})
    assert "Infinity" not in text
    assert "NaN" not in text
    assert json.loads(text)["x"]["value"] is None
    assert math.isnan(from_json(text)["x"].value)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"[1, 2]", b'{"x": {"value": null}}', b'{"x": null}', b"[" * 100_000]
)
def test_files_of_no_metrics_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with refused("damaged"):
        load(tmp_path / "a.json")
    with refused("missing", str(tmp_path / "b.json")):
        load(tmp_path / "b.json")


def test_too_small_numbers_are_refused() -> None:
    x, y = torch.rand(6, 3), torch.rand(6, 3)
    with refused("invalid", "subset_size"):
        kernel_distance(x, y, subset_size=1)
    for metric in (precision_recall, density_coverage):
        for k in (0, -1):
            with refused("invalid", "k"):
                metric(x, y, k=k)


def test_more_numbers_than_memory_has_are_refused_before_the_second_batch() -> None:
    batches = []

    def make(rows: range) -> torch.Tensor:
        batches.append(rows)
        return torch.zeros(len(rows), 3, 256, 256)

    with refused("resources", "features"):
        collect_together(Pictures("large", 1366, make, batch_size=2), Pixels())
    assert len(batches) == 1
    with refused("resources", "features"):
        Moments(LARGEST + 1, LARGEST + 1)
    assert Moments(3 * 256 * 256, 1365).count == 0


WIDE = """
import resource, sys
import torch
from carrara.evaluation.features import Pixels
from carrara.evaluation.pictures import Pictures
from carrara.evaluation import collected_reference, evaluate

def pictures(name, count, seed, shape):
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    labels = [str(row % 2) for row in range(count)]
    return Pictures(name, count, lambda rows: images[rows.start : rows.stop], labels=labels)

shape, few = tuple(map(int, sys.argv[1:4])), int(sys.argv[4])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reference, train = (collected_reference(pictures(f"r{s}", 8, s, shape), Pixels()) for s in (0, 2))
metrics = evaluate(pictures("s", few, 1, shape), reference, Pixels(), train, "svc", True).metrics
expected = {"frechet_distance", "precision", "memorised_fraction", "frechet_distance[1]", "class_accuracy"}
assert expected <= metrics.keys()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("words", ["3 256 256 8", "3 64 64 8", "1 200 200 6"], ids=["rgb 256", "rgb 64", "gray 200"])
def test_few_large_pictures_take_little_memory(words: str) -> None:
    """A covariance of 3×256×256 values has 309 GB, one of 3×64×64 takes minutes to factor. Every metric of pairs, of
    classes and of memorisation is measured."""
    run = [sys.executable, "-c", WIDE, *words.split()]
    used = int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert used < 2**29  # 8 pictures in float64 are 12 MiB; libraries that are imported on the way take 100
