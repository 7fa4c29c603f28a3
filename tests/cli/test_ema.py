"""`carrara ema`: models of other means from one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Command
from tests.runs import tiny_recipe, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept two widths at four steps."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    train(
        tiny_recipe("training.steps=8", "training.power_ema=[0.05,0.1]", "training.power_ema_every=2"),
        folder,
    )
    return folder


def test_another_width_is_a_model_that_samples(run: Path, carrara: Command) -> None:
    made = carrara("ema", run, "--width", "0.07", "--json")
    assert made.returncode == 0, made.stderr
    printed = json.loads(made.stdout)
    assert printed["folder"] == str(run / "model-power-0.07")
    assert "width 0.07 at step 8, from 8 snapshots" in printed["origin"]
    sampled = carrara("sample", printed["folder"], "--label", "3", "--steps", "2", "--json")
    assert sampled.returncode == 0, sampled.stderr


def test_a_stored_width_and_step_give_the_stored_mean(run: Path, tmp_path: Path, carrara: Command) -> None:
    assert "at step 4" in carrara("ema", run, "--width", "0.1", "--step", "4", "--out", tmp_path / "m").stdout
    stored = load_file(run / "snapshots" / "step-00000004" / "power-0.1.safetensors")
    for name, value in load_file(tmp_path / "m" / "network.safetensors").items():
        # exact but for the normal equations' solution, of condition number 1e6 in float64
        torch.testing.assert_close(value, stored[name], atol=1e-6, rtol=0)


def test_what_cannot_be_made_is_refused(run: Path, tiny_run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert str(tiny_run) in refused("ema", tiny_run, "--width", "0.1")
    assert "0.5" in refused("ema", run, "--width", "0.5")
    assert "step 1" in refused("ema", run, "--width", "0.1", "--step", "1")
    assert "missing" in refused("ema", tmp_path / "missing", "--width", "0.1")
    (tmp_path / "file").write_text("mine")
    assert "file" in refused("ema", run, "--width", "0.1", "--out", tmp_path / "file")
