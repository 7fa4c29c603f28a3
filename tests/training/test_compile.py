"""`training.compile`: the same run through torch.compile, its checkpoints those of any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from carrara import DiffusionModel
from carrara.training import Trainer
from tests.errors import refused
from tests.runs import tiny_recipe, train
from tests.training.test_loop import assert_same_bits, log_of

RECIPE = tiny_recipe(
    "training.compile=true",
    "training.steps=4",
    "training.checkpoint_every=2",
    "training.log_every=2",
    "training.sample_every=4",
    "training.tracker=none",
    "training.decay=constant",
    "network.channel_mult=[1]",
    "network.attention=[]",
    "sampling.count=2",
)


def compiles_trains_and_resumes(folder: Path) -> None:
    train(RECIPE, folder / "straight")
    steps = Trainer(RECIPE, folder / "broken").steps()
    while next(steps).step < 3:
        pass
    steps.close()  # type: ignore[attr-defined]
    train(RECIPE, folder / "broken")
    assert_same_bits(folder / "straight", folder / "broken", 4)
    with safe_open(folder / "straight" / "checkpoints" / "step-00000004" / "network.safetensors", "pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
        assert not [key for key in file.keys() if "_orig_mod" in key]  # noqa: SIM118 (it is no mapping)
    assert DiffusionModel.load(folder / "straight").sample([1], steps=2).images.shape == (1, 1, 8, 8)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that torch.compile does but for the generated code, which takes minutes to build."""
    honest = nn.Module.compile

    def compile_(module: nn.Module) -> None:
        honest(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    torch.compiler.reset()


@pytest.mark.usefixtures("traced_only")
def test_a_traced_network_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    compiles_trains_and_resumes(tmp_path)
    eager = RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update={"compile": False})})
    train(eager, tmp_path / "eager")
    for mine, theirs in zip(log_of(tmp_path / "straight"), log_of(tmp_path / "eager"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # float32 sums in another order
    shutil.rmtree(tmp_path / "straight" / "checkpoints" / "step-00000004")
    notices = [progress.notice for progress in train(eager, tmp_path / "straight") if progress.notice]
    assert any("made with compile True, this is False: bits may differ" in notice for notice in notices)


def no_triton(patch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("Cannot find a working triton installation.\nMore lines\n")

    patch.setattr(nn.Module, "compile", lambda module: setattr(module, "forward", forward))


def no_text(patch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> None:
        raise OSError

    patch.setattr(nn.Module, "compile", lambda module: setattr(module, "forward", forward))


@pytest.mark.parametrize("lacks", [no_triton, no_text])
def test_a_machine_that_cannot_compile_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: Callable[[pytest.MonkeyPatch], None]
) -> None:
    lacks(monkeypatch)
    with refused("unsupported", "training.compile"):
        Trainer(RECIPE, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_command_without_a_compiler_ends_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "carrara", "train", "digits", "--set", "training.compile=true", "--out", "run"]
    cache = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "training.compile" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor builds its code with a C++ compiler; there is no g++")
def test_a_compiled_network_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    torch.compiler.reset()
    compiles_trains_and_resumes(tmp_path)
