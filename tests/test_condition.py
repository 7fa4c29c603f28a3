"""The condition's slots: batches, dropout per sample, joins."""

from __future__ import annotations

import pytest
import torch

from carrara.condition import Condition
from carrara.conditioning import Labels
from carrara.errors import UserError


def test_one_row_serves_a_batch_and_other_counts_are_refused() -> None:
    condition = Condition(label=torch.tensor([4]), vector=torch.ones(3, 2))
    batch = condition.batch(3)
    assert batch.label is not None
    assert batch.label.tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="vector has 3 rows for a batch of 5"):
        condition.batch(5)


def test_dropout_is_per_sample() -> None:
    told = Condition(label=torch.tensor([0, 1, 2, 3]))
    mixed = told.mix(torch.tensor([True, False, True, False]), Condition(label=torch.tensor([10])))
    assert mixed.label is not None
    assert mixed.label.tolist() == [0, 10, 2, 10]


def test_mixing_different_slots_is_refused() -> None:
    with pytest.raises(UserError, match="null condition fills"):
        Condition(label=torch.tensor([1])).mix(torch.tensor([True]), Condition(vector=torch.ones(1, 2)))


def test_join_and_rows_are_inverse() -> None:
    a, b = Condition(label=torch.tensor([1, 2])), Condition(label=torch.tensor([3]))
    both = Condition.join([a, b])
    label = both.rows(slice(2, 3)).label
    assert label is not None
    assert label.tolist() == [3]
    with pytest.raises(UserError, match="cannot share a batch"):
        Condition.join([a, Condition(vector=torch.ones(1, 2))])


def test_two_attention_seams_cannot_share_a_batch() -> None:
    def one(site: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v

    with pytest.raises(UserError, match="attention seams"):
        Condition.join([Condition(attend=one), Condition()])


def test_labels_by_number_and_by_name() -> None:
    labels = Labels(("cat", "dog", "7"), dropout=0.1)
    told = labels.condition(["dog", 0, "2", "7"])
    assert told.label is not None
    assert told.label.tolist() == [1, 0, 2, 2], "a class name goes before a number"
    null = labels.null().label
    assert null is not None
    assert null.tolist() == [3]


@pytest.mark.parametrize(
    ("label", "sentence"), [(3, "label 3 is out of range"), (-1, "out of range"), ("dgo", "did you mean 'dog'")]
)
def test_a_class_that_is_not_known(label: int | str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Labels(("cat", "dog", "cow")).condition([label])


def test_a_null_label_that_was_never_trained_is_refused() -> None:
    with pytest.raises(UserError, match="trained without label dropout"):
        Labels(("cat", "dog")).null()
