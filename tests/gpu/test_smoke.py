"""What a CUDA device must do: train, sample, and agree with the CPU."""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara import DiffusionModel
from carrara.data import Batches, Preprocess, one_ahead, open_source
from carrara.devices import compute_in
from carrara.training import Trainer
from tests.data.builders import files, folder
from tests.runs import tiny_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_and_samples(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # on by default for convolutions: 10 bits of mantissa
    recipe = tiny_recipe(f"training.precision={precision}", "training.tracker=none")
    steps = Trainer(recipe, tmp_path / "run", device="cuda").steps()
    losses = [progress.loss for progress in steps if not progress.notice]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    model = DiffusionModel.load(tmp_path / "run", "cuda")
    made = model.sample([1, 2, 3], steps=4, guidance=2.0, seed=1)
    assert made.images.device.type == "cpu"
    again = DiffusionModel.load(tmp_path / "run", "cpu").sample([1, 2, 3], steps=4, guidance=2.0, seed=1)
    # the noise is the same; float32 sums of another device are rounded otherwise
    torch.testing.assert_close(made.images, again.images, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("data", "channels"), [("digits", 1), ("noise", 3)])
def test_images_arrive_as_bytes_one_ahead_and_are_the_same_floats(tmp_path: Path, data: str, channels: int) -> None:
    source = open_source("digits" if data == "digits" else folder(tmp_path, files(40)))
    batches = Batches(source, Preprocess(8, 8, channels), batch_size=16)
    for step, batch in zip(range(5), one_ahead(batches.iterate(), torch.device("cuda")), strict=False):
        expected = batches.at(step)
        assert (batch.pixels.device.type, batch.pixels.dtype) == ("cuda", torch.uint8)
        assert expected.pinned().pixels.is_pinned()
        assert torch.equal(batch.images.cpu(), expected.images)  # a product and a difference, each rounded once


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe("training.tracker=none", "training.precision=bf16"), tmp_path / "run", device="cuda")
    batches: Generator[Any] = one_ahead(trainer.batches.iterate(0), torch.device("cuda"))
    for _ in range(2):  # kernels are loaded and memory is handed out
        trainer.one_step(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.one_step(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
    trainer.end_interval()
    assert trainer.window.steps == 5
    trainer.run.close()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton builds its launcher with a C compiler; there is no gcc")
def test_a_compiled_network_trains(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.tracker=none", "training.compile=true", "training.steps=3", "network.attention=[]")
    assert all(math.isfinite(p.loss) for p in Trainer(recipe, tmp_path / "run", device="cuda").steps() if not p.notice)


def test_sampling_in_bf16_is_near_that_in_float32(tmp_path: Path) -> None:
    list(Trainer(tiny_recipe("training.tracker=none"), tmp_path / "run", device="cuda").steps())
    exact = DiffusionModel.load(tmp_path / "run", "cuda").sample([1, 2], steps=4, seed=1).images
    model = DiffusionModel.load(tmp_path / "run", "cuda")
    compute_in(model.network, "bf16", torch.device("cuda"))
    half = model.sample([1, 2], steps=4, seed=1).images
    assert float((exact - half).abs().mean()) < 0.05  # 8 bits of mantissa, a network of two levels
