"""Sets of pictures: the classes that samples take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carrara.evaluation.collect import collect
from carrara.evaluation.features import Pixels
from carrara.evaluation.features.classifier import ClassifierFeatures
from carrara.evaluation.latents import measure_latents
from carrara.evaluation.page import sample_grid
from carrara.evaluation.pictures import Pictures, apportioned, decoded_pictures
from carrara.evaluation.protocol import Evaluation
from carrara.evaluation.stamp import Stamp
from carrara.images import from_uint8
from tests.codecs.small import make
from tests.test_classifier import untrained

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


@given(COUNTS)
def test_as_many_samples_as_pictures_are_of_as_many_of_each_class(counts: list[int]) -> None:
    assert np.bincount(apportioned(counts, sum(counts)), minlength=len(counts)).tolist() == counts


@given(COUNTS, st.integers(0, 400))
def test_any_number_of_samples_is_in_the_shares(counts: list[int], n: int) -> None:
    """More samples only add to the first; no class is ever as far off as two samples."""
    classes = apportioned(counts, n)
    assert apportioned(counts, n + 7)[:n] == classes
    told = np.bincount(classes, minlength=len(counts))
    assert float(np.abs(told - n * np.asarray(counts) / sum(counts)).max()) < 2


@pytest.mark.parametrize("each", [1, 5000])
def test_equal_shares_take_the_classes_in_turn(each: int) -> None:
    assert apportioned([each] * 4, 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_page_shows_each_class_in_a_column_whatever_its_share() -> None:
    shades = from_uint8(torch.arange(0, 250, 50, dtype=torch.uint8)[:, None, None, None].expand(5, 2, 2, 1))
    grid = sample_grid(Evaluation({}, collect([shades], Pixels()), ["a", "b", "a", "a", "b"]))
    assert grid.column_labels == ["a", "b"]
    # the first of each, then the second of each; the third "a" has no neighbour
    assert torch.equal(grid.images, shades[[0, 1, 2, 4]])


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_codec_in_train_mode_is_measured_in_evaluation_mode(kind: str) -> None:
    codec, modes = make(kind).train(), list[bool]()
    for part in codec.modules():
        part.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    images = torch.zeros(2, 3, 32, 32)
    originals = Pictures("gray", 2, lambda rows: images[rows.start : rows.stop])
    decoded_pictures(codec, originals, "codec").make(range(2))
    measure_latents(codec, originals, Stamp(n=2, shape=(3, 32, 32)))
    assert modes
    assert not any(modes)
    assert all(part.training for part in codec.modules())


def test_a_classifier_in_train_mode_gives_features_and_classes_in_evaluation_mode() -> None:
    classifier, modes = untrained(), list[bool]()
    classifier.network.train()
    for part in classifier.network.modules():
        part.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    images = torch.zeros(2, *classifier.shape)
    ClassifierFeatures(classifier.network)(images)
    classifier.read(images)
    assert modes
    assert not any(modes)
    assert all(part.training for part in classifier.network.modules())
