"""What every test relies on: one thread, so that sums are taken in one order, and small runs made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import tiny_recipe, train

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache, or written there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARRARA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a very small class-conditional model of the digits."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_recipe(), folder)
    return folder


@pytest.fixture(scope="session")
def upsampler_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a very small up-sampler of the digits, from 4x4 to 8x8, told nothing else."""
    folder = tmp_path_factory.mktemp("runs") / "upsampler"
    words = ("conditioning.kind=none", "sampling.guidance=1", "upsampling.factor=2", "upsampling.noise=0.3")
    train(tiny_recipe(*words), folder)
    return folder
