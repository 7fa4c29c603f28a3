"""The condition's slots: batches, dropout per sample, joins."""

from __future__ import annotations

import torch
from torch import Tensor

from carrara.condition import Condition, Site
from carrara.process import NetworkDenoiser, schedules
from tests.errors import refused


def test_one_row_serves_a_batch_and_other_counts_are_refused() -> None:
    condition = Condition(label=torch.tensor([4]), vector=torch.ones(3, 2))
    batch = condition.batch(3)
    assert batch.label is not None
    assert batch.label.tolist() == [4, 4, 4]
    with refused("shape", "vector"):
        condition.batch(5)


def test_dropout_is_per_sample() -> None:
    given = Condition(label=torch.tensor([0, 1, 2, 3]))
    mixed = given.mix(torch.tensor([True, False, True, False]), Condition(label=torch.tensor([10])))
    assert mixed.label is not None
    assert mixed.label.tolist() == [0, 10, 2, 10]


def test_mixing_different_slots_is_refused() -> None:
    with refused("mismatch", "null"):
        Condition(label=torch.tensor([1])).mix(torch.tensor([True]), Condition(vector=torch.ones(1, 2)))


def test_join_and_rows_are_inverse() -> None:
    a, b = Condition(label=torch.tensor([1, 2])), Condition(label=torch.tensor([3]))
    both = Condition.join([a, b])
    label = both.rows(slice(2, 3)).label
    assert label is not None
    assert label.tolist() == [3]
    with refused("mismatch", "condition"):
        Condition.join([a, Condition(vector=torch.ones(1, 2))])


def test_branches_count_the_conditions_of_a_batch() -> None:
    one = Condition(label=torch.tensor([1, 2]))
    two = Condition.join([one, one])
    assert (one.branches, two.branches, Condition.join([two, two, two]).branches) == (1, 2, 6)
    assert (two.to("cpu").branches, two.batch(4).branches, two.rows(slice(0, 1)).branches) == (2, 2, 1)


def test_two_attention_seams_cannot_share_a_batch() -> None:
    def one(site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return v

    with refused("mismatch", "attend"):
        Condition.join([Condition(attend=one), Condition()])


def test_conditions_merge_where_they_fill_different_slots() -> None:
    label, vector = Condition(label=torch.tensor([1])), Condition(vector=torch.ones(1, 2))
    assert label.merge(vector).tensors().keys() == {"label", "vector"}
    with refused("conflict", "label"):
        label.merge(label)


def test_the_target_follows_its_rows_and_no_network_reads_it() -> None:
    seen: list[Condition] = []

    def network(x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.append(condition)
        return x

    condition = Condition(label=torch.tensor([1, 2]), target=torch.tensor([3, 4]))
    part = condition.rows(slice(1, 2))
    assert part.target is not None
    assert part.target.tolist() == [4]
    NetworkDenoiser(network, schedules.linear(50))(torch.zeros(2, 1), 5.0, condition)
    assert seen[0].tensors().keys() == {"label"}
