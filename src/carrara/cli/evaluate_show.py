"""How metrics are printed: tables with their intervals, and what they share of their protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from carrara.cli.console import console, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from carrara.evaluation import Interval, Measurements
    from carrara.evaluation.stamp import Comparison


def figures(found: Measurements, as_json: bool) -> None:
    """Print the metrics, each with its interval, then what they share of their protocol."""
    from carrara.evaluation import stamp

    if as_json:
        print(stamp.to_json(found))
        return
    _print_figures({name: figure for name, figure in found.items() if not name.endswith("]")})
    _print_classes({name: figure for name, figure in found.items() if name.endswith("]")})
    _print_protocols(found)


def _print_figures(found: Measurements) -> None:
    rows = Table(box=None, pad_edge=False)
    for heading in ("metric", "value", "95 % interval"):
        rows.add_column(heading, no_wrap=True)
    rows.add_column("settings")
    rows.add_column("note")
    for name, figure in found.items():
        settings = ", ".join(f"{key} {value}" for key, value in figure.stamp.settings.items())
        rows.add_row(name, f"{figure.value:.5g}", _range(figure.interval), settings, figure.note)
    console.print(rows)


def _print_classes(found: Measurements) -> None:
    """One row for each class, one column for each of its metrics."""
    from carrara.evaluation.page import by_class

    if not found:
        return
    columns, lines = by_class(found)
    rows = Table("class", *columns, box=None, pad_edge=False)
    for line in lines:
        rows.add_row(*line)
    console.print()
    console.print(rows)


def _print_protocols(found: Measurements) -> None:
    """What the metrics of one subject share, each protocol once."""
    seen: list[dict[str, object]] = []
    for name, figure in found.items():
        shared = {key: value for key, value in figure.stamp.entries().items() if not key.startswith("settings.")}
        if shared not in seen and not name.endswith("]"):
            seen.append(shared)
            console.print()
            console.print(table(shared))


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.5g} … {interval.high:.5g}"


def comparison(pairs: Sequence[Comparison], first: str, second: str) -> None:
    """Print two results side by side."""
    rows = Table("metric", first, "", second, "", "difference", "intervals", box=None, pad_edge=False)
    overlap = {True: "apart", False: "overlap", None: ""}
    for pair in pairs:
        sides = [text for m in (pair.first, pair.second) for text in (f"{m.value:.5g}", _range(m.interval))]
        rows.add_row(pair.name, *sides, f"{pair.difference:+.3g}", overlap[pair.beyond_chance])
    console.print(rows)
