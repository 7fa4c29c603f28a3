"""How `carrara evaluate` shows what it found: on the console, as JSON, as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from carrara.evaluation import Evaluation, Interval, Measurements, Reference
    from carrara.evaluation import tables as evaluation_tables


def bar(quiet: bool) -> Progress:
    """The bar of long work; nothing is seen of a quiet one, its console included."""
    from rich.console import Console

    from carrara.cli.console import progress_bar

    shown = progress_bar()
    if quiet:
        shown.disable = True
        shown.live.console = Console(quiet=True)
    return shown


def figures(found: Measurements, out: Path | None, as_json: bool) -> None:
    """Print the figures, each with its interval, then what they share of their protocol; write them if asked."""
    from carrara.cli.console import console
    from carrara.evaluation import stamp
    from carrara.files import write_whole

    text = stamp.to_json(found)
    if out is not None:
        write_whole(out, (text + "\n").encode())
    if as_json:
        print(text)
        return
    _print_figures({name: figure for name, figure in found.items() if not name.endswith("]")})
    _print_classes({name: figure for name, figure in found.items() if name.endswith("]")})
    _print_protocols(found)
    if out is not None:
        console.print(f"figures and protocols: {out}", highlight=False)


def _print_figures(found: Measurements) -> None:
    from rich.table import Table

    from carrara.cli.console import console

    rows = Table(box=None, pad_edge=False)
    for heading in ("figure", "value", "95 % interval"):
        rows.add_column(heading, no_wrap=True)
    rows.add_column("settings")
    rows.add_column("note")
    for name, figure in found.items():
        settings = ", ".join(f"{key} {value}" for key, value in figure.stamp.settings.items())
        rows.add_row(name, f"{figure.value:.5g}", _range(figure.interval), settings, figure.note)
    console.print(rows, highlight=False)


def _print_classes(found: Measurements) -> None:
    """One row for each class, one column for each of its figures."""
    from rich.table import Table

    from carrara.cli.console import console
    from carrara.evaluation.page import by_class

    if not found:
        return
    columns, lines = by_class(found)
    rows = Table("class", *columns, box=None, pad_edge=False)
    for line in lines:
        rows.add_row(*line)
    console.print()
    console.print(rows, highlight=False)


def _print_protocols(found: Measurements) -> None:
    """What the figures of one subject share, each protocol once."""
    from carrara.cli.console import console, table

    seen: list[dict[str, object]] = []
    for name, figure in found.items():
        shared = {key: value for key, value in figure.stamp.entries().items() if not key.startswith("settings.")}
        if shared not in seen and not name.endswith("]"):
            seen.append(shared)
            console.print()
            console.print(table(shared))


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.5g} … {interval.high:.5g}"


def comparison(files: tuple[Path, Path], varied: list[str], as_json: bool) -> None:
    """Print two results side by side.

    Raises:
        UserError: their protocols differ, and where; or a file that does not hold figures.
    """
    from rich.table import Table

    from carrara.cli.console import console
    from carrara.evaluation import compare, stamp

    pairs = compare(stamp.load(files[0]), stamp.load(files[1]), varied)
    if as_json:
        told = {
            pair.name: {
                "first": pair.first.value,
                "second": pair.second.value,
                "difference": pair.difference,
                "beyond_chance": pair.beyond_chance,
            }
            for pair in pairs
        }
        print(json.dumps(told, indent=2))
        return
    first, second = map(str, files)
    rows = Table("figure", first, "", second, "", "difference", "intervals", box=None, pad_edge=False)
    verdicts = {True: "apart", False: "overlap", None: ""}
    for pair in pairs:
        sides = [text for m in (pair.first, pair.second) for text in (f"{m.value:.5g}", _range(m.interval))]
        rows.add_row(pair.name, *sides, f"{pair.difference:+.3g}", verdicts[pair.beyond_chance])
    console.print(rows, highlight=False)


def write_report(
    path: Path, subject: str, found: Evaluation, real: Reference, train: Reference | None, folders: list[Path]
) -> None:
    """The page of an evaluation, with the tables that these folders hold; the first process writes it."""
    from carrara.distributed import first_tells
    from carrara.evaluation import page, tables

    filled = [tables.read(folder) for folder in folders]
    first_tells(lambda: page.of_evaluation(subject, found, real, train, filled).write(path))


def write_table(table: evaluation_tables.Table, console: Console) -> None:
    """The table as Markdown, CSV, SVG and page, in its folder; the first process writes and prints them."""
    from carrara.distributed import first_tells
    from carrara.evaluation import page, tables

    def write() -> None:
        tables.write(table)
        page.of_table(table).write(table.folder / "table.html")
        console.print(tables.markdown(table), highlight=False, markup=False)
        console.print(f"table.md, table.csv, table.svg and table.html: {table.folder}", highlight=False)

    first_tells(write)
