"""Which phase the loop is in, and the watchdog that names the one that is stuck."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from carrara.training.phases import Phases, Watchdog


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_inner_phases_interrupt_outer_ones() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases("saving"):
        clock.now += 1
        with phases("sampling"):
            clock.now += 5
            assert phases.current == ("sampling", 5)
        clock.now += 2
        assert phases.current == ("saving", 2)
    assert phases.current is None
    assert phases.seconds == {"saving": 3, "sampling": 5}


def test_the_stuck_phase_is_named_and_named_again_when_the_wait_has_doubled(tmp_path: Path) -> None:
    clock, said = Clock(), list[str]()
    phases = Phases(clock)
    watchdog = Watchdog(phases, 60, tmp_path / "stuck.txt", said.append)
    with phases("reading data"):
        for seconds in (59, 2, 30, 40):  # 59, 61, 91, 131 s
            clock.now += seconds
            watchdog.look()
    clock.now += 1000
    watchdog.look()
    with phases("optimiser"):
        clock.now += 59
        watchdog.look()
    assert [sentence.split(";")[0] for sentence in said] == [
        "nothing has moved for 61 s while reading data",
        "nothing has moved for 131 s while reading data",
    ]
    assert "test_phases.py" in (tmp_path / "stuck.txt").read_text(), "the stacks say in which line"


def test_a_long_phase_in_which_the_network_works_is_not_stuck(tmp_path: Path) -> None:
    clock, said, network = Clock(), list[str](), nn.Identity()
    phases = Phases(clock)
    watchdog = Watchdog(phases, 60, tmp_path / "stuck.txt", said.append)
    with phases("sampling"):
        with phases.moved_by(network):
            for _ in range(10):
                clock.now += 50
                network(torch.zeros(1))
                watchdog.look()
        assert said == []
        clock.now += 61
        network(torch.zeros(1))  # outside, it tells nothing
        watchdog.look()
    assert said[0].startswith("nothing has moved for 61 s while sampling")
    assert phases.seconds == {"sampling": 561}


def test_a_real_hang_is_named_by_the_thread(tmp_path: Path) -> None:
    said: list[str] = []
    phases = Phases()
    with Watchdog(phases, 0.05, tmp_path / "stuck.txt", said.append), phases("saving"):
        ended = time.monotonic() + 10
        while not said and time.monotonic() < ended:
            time.sleep(0.01)
    assert "while saving" in said[0]


def test_a_clock_that_jumps_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock goes a day ahead and a day back: neither a false alarm nor a negative time."""
    said: list[str] = []
    phases = Phases()
    watchdog = Watchdog(phases, 60, tmp_path / "stuck.txt", said.append)
    wall = time.time
    with phases("saving"):
        for jump in (86_400, -86_400):
            monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
            watchdog.look()
    assert not said
    assert 0 <= phases.seconds["saving"] < 60
