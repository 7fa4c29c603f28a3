"""Folders that the first edition wrote are loaded, sampled, and resumed. `benchmarks/digests.py` made their content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carrara import Classifier, DiffusionModel, load
from carrara.images import from_uint8, to_uint8
from carrara.recipe import load as load_recipe
from tests.runs import train

FOLDERS = Path(__file__).parents[1] / "fixtures" / "first_edition"


def stored(name: str) -> np.ndarray:
    with np.load(FOLDERS / f"{name}.npz") as archive:
        return np.asarray(archive["arr_0"])


@pytest.mark.parametrize(
    ("name", "model", "inputs"),
    [
        ("pixel", "pixel", {"labels": [3, 7], "guidance": 2.0}),
        ("latent", "latent", {"labels": [3, 7]}),
        ("guided", "pixel", {"labels": [3] * 16, "classifier": "classifier"}),
    ],
)
def test_models_make_the_pictures_that_they_made(name: str, model: str, inputs: dict[str, Any]) -> None:
    expected = stored(name)
    if "classifier" in inputs:
        inputs = {**inputs, "classifier": Classifier.load(FOLDERS / inputs["classifier"])}
    labels = [inputs["labels"][row % len(inputs["labels"])] for row in range(len(expected))]
    made = DiffusionModel.load(FOLDERS / model).sample(**{**inputs, "labels": labels}, steps=4, seed=5)
    # another processor rounds float32 otherwise: at most the next of 256 values
    assert np.abs(to_uint8(made.images).numpy().astype(int) - expected.astype(int)).max() <= 1


def test_an_up_sampler_knows_what_it_was_trained_for() -> None:
    import torch

    model = DiffusionModel.load(FOLDERS / "upsampler")
    assert model.low_res is not None
    assert model.low_res.augmentation is not None
    assert (model.low_res.factor, model.low_res.augmentation.fraction) == (2, 0.3)
    small = np.random.Generator(np.random.Philox(1)).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    made = model.sample(low_res=from_uint8(torch.from_numpy(small)[..., None]), steps=4, seed=5)
    expected = stored("upsampler")
    assert np.abs(to_uint8(made.images).numpy().astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["vq", "latent/codec", "classifier", "pixel", "run"])
def test_whatever_it_saved_is_loaded(name: str) -> None:
    load(FOLDERS / name)


def test_a_run_is_resumed(tmp_path: Path) -> None:
    run = Path(shutil.copytree(FOLDERS / "run", tmp_path / "run"))
    recipe = load_recipe(str(run / "recipe.yaml"), ["training.steps=18"])
    steps = [progress.step for progress in train(recipe, run)]
    assert steps[-3:] == [16, 17, 18]
    assert DiffusionModel.load(run).class_labels is not None
