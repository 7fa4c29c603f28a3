"""How events are shown: bars on a terminal, lines where the output is piped, JSON on request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from carrara.app.events import Event, StepDone

# Names of classes and files are the user's own: "[/INST]" is not markup.
console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
errors = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

HEARTBEAT = 15.0
"""Seconds after which piped output repeats how far the work is."""


def table(values: Mapping[str, object]) -> Table:
    """Names and values, one pair a row."""
    result = Table(show_header=False, box=None, pad_edge=False)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        result.add_row(name, shown)
    return result


def show(events: Iterable[Event], quiet: bool = False) -> Iterator[Event]:
    """Show the steps and notices of a use case, and yield every other event.

    Args:
        quiet: keep stdout for the result: progress and notices go to stderr, and notices are yielded, too.
    """
    from carrara.app.events import Notice, StepDone

    with _progress(quiet) as progress:
        for event in events:
            if isinstance(event, StepDone):
                progress.step(event)
                continue
            if isinstance(event, Notice):
                (errors if quiet else console).print(f"! {event.text}", style="yellow")
            if quiet or not isinstance(event, Notice):
                yield event


class _Bars:
    """A bar for each task."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def step(self, event: StepDone) -> None:
        if event.task not in self.tasks:
            self.tasks[event.task] = self.bar.add_task(event.task, total=event.total or None, note="")
        task = self.tasks[event.task]
        self.bar.update(task, completed=event.step, total=event.total or None, note=event.note)


class _Lines:
    """A line now and then, whether or not anything has moved since the last."""

    def __init__(self, to: Console) -> None:
        self.to, self.text, self.began = to, "starting", time.monotonic()
        self.printed = self.began

    def step(self, event: StepDone) -> None:
        done = f"{event.step:,} of {event.total:,}" if event.total else f"{event.step:,}" if event.step else "…"
        self.text = f"{event.task}: {done}  {event.note}".rstrip()
        if time.monotonic() - self.printed >= HEARTBEAT:
            self.line()

    def line(self) -> None:
        self.printed = time.monotonic()
        self.to.print(f"[{self.printed - self.began:,.0f} s] {self.text}")

    def beat(self, ended: threading.Event) -> None:
        first = os.environ.get("RANK", "0") == "0"  # of several processes the first reports
        while first and not ended.wait(min(1.0, HEARTBEAT)):
            if time.monotonic() - self.printed >= HEARTBEAT:
                self.line()


@contextmanager
def _progress(quiet: bool) -> Iterator[_Bars | _Lines]:
    to = errors if quiet else console
    if to.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=to,
            transient=quiet,
            redirect_stdout=not quiet,  # else the result would go where the bar is, to stderr
        ) as bar:
            yield _Bars(bar)
        return
    lines, ended = _Lines(to), threading.Event()
    thread = threading.Thread(target=lines.beat, args=(ended,), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
