"""`carrara train`: a shipped recipe, a recipe file, or a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from carrara.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from carrara.app.events import Event, Metrics
    from carrara.app.train import SelfTestRequest


def train(
    what: Annotated[str, typer.Argument(metavar="RECIPE|FOLDER", help="A shipped recipe, a YAML file, or images.")],
    out: Annotated[Path | None, Option("--out", help="The run folder; default: runs/NAME.")] = None,
    assignments: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. training.steps=500. Repeatable."),
    ] = None,
    data: Annotated[str | None, Option("--data", metavar="PATH", help="data.path.")] = None,
    resolution: Annotated[str | None, Option(help="data.resolution: one side, or HEIGHTxWIDTH.")] = None,
    batch_size: Annotated[int | None, Option("--batch-size", help="training.batch_size.")] = None,
    steps: Annotated[int | None, Option(help="training.steps.")] = None,
    learning_rate: Annotated[float | None, Option("--learning-rate", help="training.learning_rate.")] = None,
    precision: Annotated[str | None, Option(help="training.precision: auto, fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, Option(help="seed.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
    resume: Annotated[
        str, Option("--resume-from-checkpoint", help="Only 'latest', which is what happens anyway.")
    ] = "latest",
    accept_changes: Annotated[
        bool, Option("--accept-changes", help="Resume although the run folder's recipe or the data changed.")
    ] = False,
    overfit: Annotated[
        bool, Option("--overfit-one-batch", help="Self-test: can this recipe learn one batch by heart?")
    ] = False,
    profile: Annotated[bool, Option("--profile", help="Self-test: where does the time of a step go?")] = False,
    json_lines: Annotated[bool, Option("--json", help="Print one JSON object per log interval.")] = False,
) -> None:
    """Train a model. To resume, run the same command again; Ctrl-C saves and stops."""
    from carrara.app import train as app

    if resume != "latest":
        raise UserError(
            f"--resume_from_checkpoint {resume}: a run resumes from its newest whole checkpoint, 'latest'.",
            key="resume_from_checkpoint",
            code="unsupported",
        )
    aliases = {
        "data.path": data,
        "data.resolution": f"[{resolution.replace('x', ',')}]" if resolution and "x" in resolution else resolution,
        "training.batch_size": batch_size,
        "training.steps": steps,
        "training.learning_rate": learning_rate,
        "seed": seed,
    }
    changes = _changes({key: value for key, value in aliases.items() if value is not None}, assignments or [])
    given = {"what": what, "out": out, "changes": changes, "device": device, "precision": precision}
    if overfit or profile:
        tests = app.SelfTestRequest(**given, overfit_one_batch=overfit, profile=profile)
        _self_test(tests, json_lines)
        return
    request = app.TrainRequest(**given, accept_changes=accept_changes)
    show_training(app.train(request), json_lines)


def _changes(options: Mapping[str, object], assignments: list[str]) -> list[str]:
    """The options and the --set assignments as KEY=VALUE.

    Raises:
        UserError: an option and an assignment give one key two values.
    """
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key in options and value != str(options[key]):
            raise UserError(
                f"--set {assignment} and the option for {key}, {options[key]}, contradict each other: leave one "
                "of them out.",
                key=key,
                code="conflict",
            )
    return [f"{key}={value}" for key, value in options.items()] + assignments


def show_training(events: Iterable[Event], json_lines: bool = False) -> None:
    """Show a training until it ends.

    Raises:
        typer.Exit: with 130, where a signal stopped it.
    """
    import json

    from carrara.app.events import Metrics, Notice, Saved
    from carrara.cli.console import show

    for event in show(events, quiet=json_lines):
        if not json_lines:
            show_event(event)
        elif isinstance(event, Notice):
            print(json.dumps({"notice": event.text}), flush=True)
        elif isinstance(event, Metrics):
            print(json.dumps(event.values), flush=True)
        elif isinstance(event, Saved) and event.what == "checkpoint":
            print(json.dumps(event.about))
            raise typer.Exit(130)


def show_event(event: Event) -> None:
    """Print where a training starts and what it saves.

    Raises:
        typer.Exit: with 130, where a signal stopped it.
    """
    from carrara.app.events import Metrics, Saved
    from carrara.cli.console import console

    if isinstance(event, Metrics) and event.name == "start":
        _print_start(event)
    elif isinstance(event, Saved) and event.what == "checkpoint":
        console.print(f"stopped and saved at step {event.about['stopped']}: run the same command again to resume.")
        raise typer.Exit(130)
    elif isinstance(event, Saved):
        console.print(f"{event.what}: {event.path}")


def _print_start(event: Metrics) -> None:
    from carrara.cli.console import console, table

    for reason in event.values["reasons"]:
        console.print(reason)
    console.print(table(event.values["start"]))
    console.print(f"run folder: {event.values['run']}")


def _self_test(request: SelfTestRequest, json_lines: bool) -> None:
    import json

    from carrara.app.events import Metrics
    from carrara.app.train import self_test
    from carrara.cli.console import console, show, table

    results = {event.name: event.values for event in show(self_test(request), json_lines) if isinstance(event, Metrics)}
    if json_lines:
        print(json.dumps(results), flush=True)
    elif "profile" in results:
        rows = results["profile"]
        console.print(table({k: v for k, v in rows.items() if not isinstance(v, dict)}))
        for title in ("shares", "operations"):
            console.print(table({name: f"{fraction:.1%}" for name, fraction in rows[title].items()}))
    if "overfit" in results:
        overfit = results["overfit"]
        outcome = "learned by heart" if overfit["passed"] else "NOT learned: fix the recipe before you train"
        if not json_lines:
            reached = f"loss at {overfit['loss_share']:.1%} of its start after {overfit['steps']} steps"
            console.print(f"one batch: {outcome} ({reached})")
        raise typer.Exit(0 if overfit["passed"] else 1)
