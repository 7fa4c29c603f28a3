"""What a CUDA device must do: train, sample, and agree with the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from carrara import DiffusionModel
from carrara.data import Batches, Preprocess, one_ahead, open_source
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
    losses = [progress.loss for progress in Trainer(recipe, tmp_path / "run", device="cuda").steps() if progress.loss]
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
