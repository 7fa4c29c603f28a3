"""`carrara demo`: train on real handwriting, sample, measure, and write a report worth looking at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from carrara.cli import options as o


def demo(
    out: Annotated[Path, Option("--out", help="The run folder.")] = Path("runs/demo"),
    assignments: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Change the recipe 'digits', e.g. training.steps=500."),
    ] = None,
    device: o.Device = "auto",
    json_output: Annotated[bool, Option("--json", help="Print events as JSON lines.")] = False,
) -> None:
    """Train on 1,437 scanned digits, sample, measure, and write report.html: a few minutes on two cores."""
    import json

    from carrara.app.demo import DemoRequest
    from carrara.app.demo import demo as events
    from carrara.app.events import Metrics
    from carrara.cli.console import console, show
    from carrara.cli.train import show_event

    request = DemoRequest(out=out, changes=assignments or (), device=device)
    for event in show(events(request), json_output):
        if json_output:
            print(json.dumps(event.as_json()), flush=True)
        elif isinstance(event, Metrics) and event.name == "demo":
            for metric in event.result.metrics:
                reached = {True: "reached", False: "MISSED", None: ""}[metric.reached]
                console.print(f"{metric.name}: {metric.value_text} {metric.unit} {reached}")
        else:
            show_event(event)
