"""Class labels: by number and by name, dropped by their own draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from carrara.condition import Condition
from carrara.conditioning import ClassLabels
from carrara.process import Noise
from tests.errors import refused

PETS = ClassLabels(("cat", "dog", "7"), dropout=0.1)


def test_labels_by_number_and_by_name() -> None:
    array = PETS.encode({"labels": np.array([2, 0])}, Noise()).label
    assert array is not None
    assert array.tolist() == [2, 0]
    condition = PETS.encode({"labels": ["dog", 0, "2", "7", np.int64(1)]}, Noise())
    assert condition.label is not None
    assert condition.label.tolist() == [1, 0, 2, 2, 1], "a text is a class's name before it is a number"
    null = PETS.null(condition).label
    assert null is not None
    assert null.tolist() == [3] * 5


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        ([3], "invalid"),
        ([-1], "invalid"),
        (["dgo"], "unknown"),
        (["²"], "unknown"),
        ([2.7], "invalid"),
        (torch.tensor([1.0]), "invalid"),
        ([None], "invalid"),
        ("37", "invalid"),
        (3, "invalid"),
        (None, "missing"),
    ],
)
def test_what_is_no_class_is_refused(labels: Any, code: Any) -> None:
    with refused(code, "labels"):
        PETS.encode({"labels": labels}, Noise())


def test_null_changes_the_label_alone() -> None:
    vector = torch.ones(2, 3)
    null = PETS.null(Condition(label=torch.tensor([0, 1]), vector=vector))
    assert null.vector is vector


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_is_a_probability(dropout: float) -> None:
    with refused("invalid", "conditioning.dropout"):
        ClassLabels(("a",), dropout)


def test_config_round_trip() -> None:
    assert ClassLabels.from_config(PETS.config()) == PETS
