"""What long work shows: tables, a bar with speed and time left."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console()


def table(values: Mapping[str, object]) -> Table:
    """Names and values, one pair a row."""
    result = Table(show_header=False, box=None, pad_edge=False)
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        result.add_row(name, shown)
    return result


def progress_bar() -> Progress:
    """A bar with counts, a free note, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
