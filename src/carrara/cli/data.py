"""`carrara data`: look at images before training on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carrara.cli.options import Commands, typed

if TYPE_CHECKING:
    from carrara.data.check import DataReport

app = typer.Typer(cls=Commands, help="Look at images before training on them.", no_args_is_help=True)

_SHOWN = 10


@app.callback()
def data() -> None:
    """Look at images before training on them."""


@app.command()
def check(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A folder, parquet, zip or tar file, or the word 'digits'.")],
    split: Annotated[str, typer.Option(help="Which split, where the data has several.")] = "train",
    resolution: Annotated[str | None, typer.Option(help="Size to train at: N or HxW.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 gray, 3 RGB, 4 RGBA.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps to train, for the number of epochs.")] = 10_000,
    images_per_second: Annotated[float | None, typer.Option(help="Training speed, for the hours.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The caption column, if not 'text'.")] = None,
    unreadable_limit: Annotated[float, typer.Option(help="Fraction of unreadable images that is skipped.")] = 0.01,
    sample: Annotated[int | None, typer.Option(help="Look at this many images only.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Write three images before and after, as one.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report what is in PATH and what training would make of it; exit code 2 if training would fail."""
    from carrara.app.data import CheckRequest
    from carrara.app.data import check as events
    from carrara.app.events import Metrics
    from carrara.cli.console import show

    for event in show(events(CheckRequest(**typed(context))), json_output):
        if not isinstance(event, Metrics):
            continue
        if json_output:
            print(event.result.to_json())
        else:
            print_report(event.result)
        if not event.result.ok:
            raise typer.Exit(2)


def print_report(report: DataReport) -> None:
    """Print a report for people."""
    from carrara.cli.console import console, table

    console.print(table(dict(_facts(report))))
    if report.classes:
        console.print(_class_table(report.classes))
    for title, groups in (("exact", report.exact_duplicates), ("near", report.near_duplicates)):
        for group in groups[:_SHOWN]:
            console.print(f"{title} duplicates: {', '.join(group[:6])}{' …' * (len(group) > 6)}")
        if len(groups) > _SHOWN:
            console.print(f"… and {len(groups) - _SHOWN} more groups of {title} duplicates (all with --json)")
    for line in report.warnings:
        console.print(f"! {line}", style="yellow")
    for line in report.problems:
        console.print(f"✗ {line}", style="bold red")
    if report.ok:
        console.print("✓ training can start", style="green")


def _facts(report: DataReport) -> list[tuple[str, str]]:
    from carrara.data.source import counted

    looked = "" if report.looked_at == report.images else f" ({report.looked_at} looked at)"
    facts = [
        ("data", f"{report.path}, split '{report.split}'"),
        ("layout", report.layout),
        ("images", f"{report.images}{looked}, {len(report.unreadable)} unreadable"),
    ]
    if report.sizes:
        low, middle, high = report.sizes["shorter_side"]
        facts += [
            (
                "size",
                f"{_range(report.sizes['width'])} wide, {_range(report.sizes['height'])} high, "
                f"{counted(report.sizes['shapes'], 'shape')}, shorter side {low} to {high}, median {middle}",
            ),
            ("colour", ", ".join(f"{count} {mode}" for mode, count in report.modes.items())),
        ]
    if report.captions:
        words = _range(report.captions["words"])
        facts.append(
            ("captions", f"{report.captions['distinct']} distinct of {report.captions['count']}, {words} words")
        )
    if report.suggested:
        height, width = report.suggested["resolution"]
        facts += [
            ("suggested", f"{height}×{width}, channels: {report.suggested['channels']}"),
            ("prepared", report.prepared),
        ]
    facts.append(("plan", _plan(report.plan)))
    facts.append(("reading", f"{report.timings['images_per_second']:,.0f} images/s in this check"))
    return facts


def _plan(plan: dict[str, Any]) -> str:
    text = f"{plan['steps']:,} steps of {plan['batch_size']} are {plan['epochs']:,g} epochs"
    return text if plan["hours"] is None else f"{text}, about {plan['hours']:g} hours"


def _range(values: list[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _class_table(classes: dict[str, int]) -> Any:
    from rich.table import Table

    table = Table("class", "images", box=None, padding=(0, 2, 0, 0))
    for name, count in list(classes.items())[:50]:
        table.add_row(name, str(count))
    if len(classes) > 50:
        table.add_row(f"… and {len(classes) - 50} more", "")
    return table
