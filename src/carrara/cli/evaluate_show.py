"""How metrics are printed: tables with their intervals, and what their protocols have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from carrara.cli.console import console, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from carrara.evaluation import Interval, Measurements
    from carrara.evaluation.stamp import Comparison


def metrics(measured: Measurements, as_json: bool) -> None:
    """Print the metrics, each with its interval, then what their protocols have in common."""
    from carrara.evaluation import stamp

    if as_json:
        print(stamp.to_json(measured))
        return
    _print_metrics({name: metric for name, metric in measured.items() if not name.endswith("]")})
    _print_classes({name: metric for name, metric in measured.items() if name.endswith("]")})
    _print_protocols(measured)


def _print_metrics(measured: Measurements) -> None:
    rows = Table(box=None, pad_edge=False)
    for heading in ("metric", "value", "95 % interval"):
        rows.add_column(heading, no_wrap=True)
    rows.add_column("settings")
    rows.add_column("note")
    for name, metric in measured.items():
        settings = ", ".join(f"{key} {value}" for key, value in metric.stamp.settings.items())
        rows.add_row(name, f"{metric.value:.5g}", _range(metric.interval), settings, metric.note)
    console.print(rows)


def _print_classes(measured: Measurements) -> None:
    """One row for each class, one column for each of its metrics."""
    from carrara.evaluation.page import by_class

    if not measured:
        return
    columns, lines = by_class(measured)
    rows = Table("class", *columns, box=None, pad_edge=False)
    for line in lines:
        rows.add_row(*line)
    console.print()
    console.print(rows)


def _print_protocols(measured: Measurements) -> None:
    """The protocols of the metrics, each once."""
    seen: list[dict[str, object]] = []
    for name, metric in measured.items():
        shared = {key: value for key, value in metric.stamp.entries().items() if not key.startswith("settings.")}
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
