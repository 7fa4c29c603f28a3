"""`carrara evaluate`, `carrara compare` and `carrara sweep`: metrics of a model or of finished samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from carrara.cli import options as o
from carrara.errors import UserError

Subject = Annotated[
    str | None, typer.Argument(metavar="MODEL|SAMPLES", help="A run folder, or images: a folder, npz, data set.")
]
Split = Annotated[str, Option(help="Which part of SAMPLES.")]
HeldOut = Annotated[o.Words, Option(help="Images a model never saw: their bits per dimension.")]
PartOfThem = Annotated[str, Option(help="Which part of them.")]
HeldOutCount = Annotated[o.Number, Option(help="How many of them; default: all.")]
Variance = Annotated[o.Words, Option(help="Of the bound's reverse steps: small, large, learned.")]
Originals = Annotated[
    o.Words,
    Option(help="What SAMPLES should be, one by one; of a codec or a latent model, what is encoded and decoded."),
]
Lpips = Annotated[o.Words, Option(help="Weights of LPIPS on VGG-16, a local file, for --originals.")]
LpipsChecksum = Annotated[o.Words, Option(help="The SHA-256 that file must have.")]
Captions = Annotated[
    Path | None, Option(help="Lines that describe each of SAMPLES, for clip features; a data set has its own.")
]
ReportFile = Annotated[Path | None, Option(help="Write one HTML page: samples, neighbours, classes, curves, tables.")]
Tables = Annotated[list[Path] | None, Option(help="A folder that sweep filled, for --report. Repeatable.")]
Out = Annotated[Path | None, Option(help="Write metrics and protocols as JSON.")]
Varied = Annotated[list[str] | None, Option(help="What may differ, e.g. sampling.steps. Repeatable.")]


def evaluate(
    context: typer.Context,
    subject: Subject = None,
    reference: o.Reference = None,
    reference_split: o.ReferenceSplit = "train",
    features: o.Features = "pixels",
    checksum: o.Checksum = None,
    n: o.Count = None,
    split: Split = "train",
    resolution: o.Resolution = None,
    channels: o.Channels = None,
    resize: o.Resize = "adm",
    train: o.Train = None,
    train_split: o.TrainSplit = "train",
    held_out: HeldOut = None,
    held_out_split: PartOfThem = "test",
    held_out_n: HeldOutCount = None,
    variance: Variance = None,
    originals: Originals = None,
    originals_split: PartOfThem = "train",
    lpips: Lpips = None,
    lpips_checksum: LpipsChecksum = None,
    captions: Captions = None,
    evaluator: o.Evaluator = None,
    per_class: o.PerClass = False,
    classes: o.Classes = None,
    steps: o.Steps = None,
    solver: o.Solver = None,
    guidance: o.Guidance = None,
    classifier: o.Classifier = None,
    classifier_scale: o.ClassifierScale = None,
    eta: o.Eta = None,
    spacing: o.Spacing = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 64,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    report: ReportFile = None,
    tables: Tables = None,
    out: Out = None,
    comparison: Annotated[tuple[Path, Path] | None, Option("--compare", hidden=True)] = None,
    varied: Annotated[list[str] | None, Option(hidden=True)] = None,
    table: Annotated[o.Words, Option(hidden=True)] = None,
    json_output: o.Json = False,
) -> None:
    """Measure a model, a codec or finished samples.

    `torchrun` divides the work among several processes; the metrics stay the same.
    """
    given = o.typed(context)
    if comparison is not None:
        o.moved("evaluate --compare", "carrara compare A.json B.json")
        o.refuse_others("--compare", given, {"comparison", "varied"})
        _compare(*comparison, varied, json_output)
    elif table is not None:
        o.moved("evaluate --table", "carrara sweep MODEL --table")
        _sweep(given, json_output)
    else:
        _evaluate(given, json_output)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A file of evaluate --out.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another.")],
    varied: Varied = None,
    json_output: o.Json = False,
) -> None:
    """Compare two results of `evaluate`, if they were measured alike."""
    _compare(first, second, varied, json_output)


def sweep(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="MODEL", help="A run or model folder.")],
    table: Annotated[str, Option(help="ddim, guidance or solvers.")],
    reference: Annotated[str, Option(help="Real images: a data set, folder, npz; or a statistics npz.")],
    out: Annotated[Path, Option(help="The folder of the table; an interrupted one is continued.")],
    reference_split: o.ReferenceSplit = "train",
    features: o.Features = "pixels",
    checksum: o.Checksum = None,
    n: o.Count = None,
    resolution: o.Resolution = None,
    channels: o.Channels = None,
    resize: o.Resize = "adm",
    train: o.Train = None,
    train_split: o.TrainSplit = "train",
    evaluator: o.Evaluator = None,
    per_class: o.PerClass = False,
    classes: o.Classes = None,
    steps: o.Steps = None,
    solver: o.Solver = None,
    guidance: o.Guidance = None,
    classifier: o.Classifier = None,
    classifier_scale: o.ClassifierScale = None,
    eta: o.Eta = None,
    spacing: o.Spacing = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 64,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    json_output: o.Json = False,
) -> None:
    """Measure a model sampled in many ways: tables as text, CSV, SVG and page."""
    _sweep(o.typed(context), json_output)


def _evaluate(given: dict[str, object], json_output: bool) -> None:
    from carrara.app.evaluate import evaluate as events
    from carrara.app.evaluate_request import EvaluateRequest
    from carrara.app.events import Metrics, Saved
    from carrara.cli import evaluate_show
    from carrara.cli.console import console, show

    if "varied" in given:
        raise UserError("--varied belongs to carrara compare: leave it out.", key="varied", code="conflict")
    for event in show(events(EvaluateRequest(**given)), json_output):
        if isinstance(event, Metrics):
            evaluate_show.metrics(event.result, json_output)
        elif isinstance(event, Saved) and not json_output:
            console.print(f"{event.what}: {event.path}")


def _compare(first: Path, second: Path, varied: list[str] | None, json_output: bool) -> None:
    import json

    from carrara.app.compare import CompareRequest
    from carrara.app.compare import compare as events
    from carrara.app.events import Metrics
    from carrara.cli import evaluate_show
    from carrara.cli.console import show

    for event in show(events(CompareRequest(first=first, second=second, varied=varied or ())), json_output):
        if isinstance(event, Metrics) and json_output:
            print(json.dumps(event.values, indent=2))
        elif isinstance(event, Metrics):
            evaluate_show.comparison(event.result, str(first), str(second))


def _sweep(given: dict[str, object], json_output: bool) -> None:
    import json

    from carrara.app.evaluate import sweep as events
    from carrara.app.evaluate_request import SweepRequest
    from carrara.app.events import Metrics, Saved
    from carrara.cli.console import console, show

    o.refuse_others("a table", given, set(SweepRequest.model_fields))
    for event in show(events(SweepRequest(**given)), json_output):
        if isinstance(event, Metrics) and json_output:
            print(json.dumps(event.values))
        elif isinstance(event, Metrics):
            from carrara.evaluation import tables

            console.print(tables.markdown(event.result))
        elif isinstance(event, Saved) and not json_output:
            console.print(f"table.md, table.csv, table.svg and table.html: {event.path}")
