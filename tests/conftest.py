"""What every test relies on: one thread, so that sums are taken in one order, and small runs made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import tiny_recipe, train

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a very small class-conditional model of the digits."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_recipe(), folder)
    return folder
