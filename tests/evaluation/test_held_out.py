"""Bits per dimension and the flow's likelihood of held-out pictures, as figures with interval and stamp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from carrara.condition import Condition
from carrara.evaluation import bits_per_dimension, data_pictures, flow_likelihood, measure_held_out
from carrara.evaluation.pictures import Size
from carrara.evaluation.stamp import from_json, to_json
from carrara.model import DiffusionModel
from carrara.process import Noise
from tests.errors import refused

COUNT = 12


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> DiffusionModel:
    return DiffusionModel.load(tiny_run)


def test_figures_are_those_of_the_functions_with_their_intervals(model: DiffusionModel) -> None:
    pictures = data_pictures("digits", "test", COUNT, batch_size=5, rounded=False)
    told: list[int] = []
    figures = measure_held_out(model, pictures, steps=4, probes=3, progress=told.append)
    assert told == [5, 5, 2]
    images = torch.cat(list(pictures.batches()))
    assert pictures.labels is not None
    assert model.class_labels is not None
    condition = Condition(label=model.class_labels.indices(pictures.labels))
    bound = bits_per_dimension(model, images, condition=condition, noise=Noise(0))
    # The same sums in batches of another size: float32 of terms of order one.
    assert figures["bits_per_dimension"].value == pytest.approx(float(bound.total.mean()), rel=1e-4)
    flow = flow_likelihood(model, images, steps=4, probes=3, condition=condition, noise=Noise(1))
    assert figures["flow_bits_per_dimension"].value == pytest.approx(float(flow.value.mean()), rel=1e-4)
    parts = [figures[f"bits_{part}"].value for part in ("prior", "matching", "reconstruction")]
    assert figures["bits_per_dimension"].value == pytest.approx(sum(parts))
    for name, figure in figures.items():
        assert figure.interval is not None
        assert figure.interval.low <= figure.value <= figure.interval.high, name
    stamp = figures["bits_per_dimension"].stamp
    assert stamp.n == COUNT
    assert stamp.dtype == "17 levels"
    assert stamp.reference_split == "test"
    assert stamp.settings["levels"] == 1000
    assert stamp.settings["variance"] == "small"
    assert stamp.sampling["condition"] == "own class"
    assert "standard error" in figures["flow_bits_per_dimension"].note
    assert len(figures["bits_per_dimension"].details["terms"]) == 1000
    assert from_json(to_json(figures)) == figures


def test_unlabelled_pictures_are_asked_without_a_class(model: DiffusionModel) -> None:
    pictures = replace(data_pictures("digits", "test", 2, rounded=False), labels=None)
    figures = measure_held_out(model, pictures, steps=1, probes=2)
    assert figures["bits_per_dimension"].stamp.sampling["condition"] == "dropped label"


def test_pictures_of_other_levels_or_sizes_are_refused(model: DiffusionModel) -> None:
    rounded = data_pictures("digits", "test", 2)
    with refused("mismatch", "levels"):
        measure_held_out(model, rounded)
    large = data_pictures("digits", "test", 2, Size((16, 16)), rounded=False)
    with refused("shape", "resolution"):
        measure_held_out(model, large)
