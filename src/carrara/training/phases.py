"""What the loop is doing now and for how long, and a watchdog that reports a phase that takes too long."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn


class Phases:
    """The phases of the loop, one at a time.

    Args:
        clock: seconds that never jump; the wall clock would (daylight saving, a corrected clock, a suspended laptop).

    Attributes:
        seconds: spent in each phase so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._now: tuple[str, float] | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """While inside, the loop is in this phase; an inner phase interrupts an outer one."""
        outer, began = self._now, self.clock()
        self._account(began)
        self._now = (name, began)
        try:
            yield
        finally:
            ended = self.clock()
            self._account(ended)
            self._now = None if outer is None else (outer[0], ended)

    @contextmanager
    def moved_by(self, module: nn.Module) -> Iterator[None]:
        """While inside, every pass of the module shows that the phase moves, however long all of it takes."""
        hook = module.register_forward_hook(lambda *_: self.moved())
        try:
            yield
        finally:
            hook.remove()

    def moved(self) -> None:
        """The phase is not stuck: its wait starts again."""
        if self._now is not None:
            now = self.clock()
            self._account(now)
            self._now = (self._now[0], now)

    def _account(self, now: float) -> None:
        if self._now is not None:
            self.seconds[self._now[0]] += now - self._now[1]

    @property
    def current(self) -> tuple[str, float] | None:
        """The phase and for how long nothing has moved in it, or None between phases."""
        now = self._now
        return None if now is None else (now[0], self.clock() - now[1])


class Timing:
    """Speed and shares of the phases between two lines of the log."""

    def __init__(self, phases: Phases, step: int) -> None:
        self.phases = phases
        self._last = phases.clock(), step, phases.seconds.copy()

    def since_last(self, step: int, batch_size: int, flops_per_image: int) -> dict[str, Any]:
        """Since the last call: images and floating-point operations a second, and the share of the time that each phase
        took; `data_wait` is that of reading data."""
        then, step_then, before = self._last
        self._last = self.phases.clock(), step, self.phases.seconds.copy()
        seconds = passed(then, self._last[0])
        speed = (step - step_then) * batch_size / seconds
        shares = {name: round((total - before[name]) / seconds, 4) for name, total in self.phases.seconds.items()}
        return {
            "images_per_s": round(speed, 2),
            "flops_per_s": round(speed * flops_per_image),
            "data_wait": shares.get("reading data", 0.0),
            "shares": shares,
        }


def passed(then: float, now: float) -> float:
    """Seconds between two readings of a clock; never 0 or less, whatever a broken clock reads."""
    return max(now - then, 1e-9)


class Watchdog:
    """A thread that names the phase that is stuck, again each time the wait has doubled.

    Only reported, never acted upon: a slow disk looks like a dead one, and the state is safe in either case.

    Args:
        phases: what the loop is doing.
        limit: seconds in one phase.
        stacks: where the Python stacks of all threads are appended at that moment.
        report: takes the sentence; default: it is printed to stderr.
    """

    def __init__(self, phases: Phases, limit: float, stacks: Path, report: Callable[[str], None] | None = None) -> None:
        self.phases, self.limit, self.stacks = phases, limit, stacks
        self.report = report or (lambda sentence: print(f"carrara: {sentence}", file=sys.stderr, flush=True))
        self._reported: tuple[str, float] = ("", limit)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(self.limit / 4, 10)):
            self.look()

    def look(self) -> None:
        """Report the phase that is stuck, if one is."""
        current = self.phases.current
        if current is None:
            return
        name, lasted = current
        if name != self._reported[0] or lasted < self.limit:
            self._reported = (name, self.limit)
        if lasted < self._reported[1]:
            return
        self._reported = (name, 2 * lasted)
        self.report(f"nothing has moved for {lasted:,.0f} s while {name}; {self.stacks} has the stacks of all threads.")
        with open(self.stacks, "a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
