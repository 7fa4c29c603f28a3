"""What a checkpoint holds, taken out of a training and kept apart from it."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import pytest
import torch

from carrara.training.checkpoint import Writer
from carrara.training.state import copied


def test_a_copy_does_not_change_with_what_it_was_taken_from() -> None:
    live: dict[str, Any] = {"weights": [torch.zeros(3), torch.ones(2, 2)], "step": 3, "name": "w"}
    copy = copied(live)
    live["weights"][0].fill_(7)
    assert copy["weights"][0].tolist() == [0, 0, 0]
    assert (copy["step"], copy["name"]) == (3, "w")


def test_the_next_copy_takes_the_memory_of_the_one_before() -> None:
    live: dict[str, Any] = {"weight": torch.zeros(4), "moments": {0: {"step": torch.tensor(1.0)}}}
    first = copied(live)
    places = first["weight"].data_ptr(), first["moments"][0]["step"].data_ptr()
    live["weight"].fill_(2)
    live["moments"][0]["step"] += 1
    second = copied(live, first)
    assert second["weight"].tolist() == [2, 2, 2, 2]
    assert float(second["moments"][0]["step"]) == 2
    assert (second["weight"].data_ptr(), second["moments"][0]["step"].data_ptr()) == places


@pytest.mark.parametrize("place", [None, {"weight": torch.zeros(3)}, {"weight": torch.zeros(4, dtype=torch.int64)}, 3])
def test_a_place_that_does_not_fit_is_left_alone(place: object) -> None:
    copy = copied({"weight": torch.full((4,), 5.0)}, place)
    assert copy["weight"].tolist() == [5, 5, 5, 5]
    assert copy["weight"].dtype == torch.float32


def test_channels_last_weights_are_written_like_others() -> None:
    weight = torch.randn(4, 3, 2, 2)
    plain, other = copied(weight), copied(weight.contiguous(memory_format=torch.channels_last))
    assert torch.equal(plain, other)
    assert other.is_contiguous()
    assert torch.equal(copied(weight * 2, other), weight * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_writing_gives_way_to_training() -> None:
    niceness: list[int] = []
    writer = Writer()
    writer.start(lambda: niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    writer.wait()
    writer.close()
    assert niceness[0] > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
