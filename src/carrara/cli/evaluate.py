"""`carrara evaluate`: every figure of a model or of finished samples, each with the protocol that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from carrara.evaluation import Interval, Measurements
    from carrara.evaluation.features import Features
    from carrara.evaluation.protocol import Pictures, Reference, Size
    from carrara.model import DiffusionModel

SAMPLING = {"steps", "solver", "guidance", "seed", "eta", "spacing", "batch_size"}
COMPARING = {"comparison", "varied", "json_output"}


def evaluate(
    context: typer.Context,
    subject: Annotated[
        str | None, typer.Argument(metavar="MODEL|SAMPLES", help="A run folder, or images: a folder, npz, data set.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Real images: a data set, folder, npz; or a statistics npz.")
    ] = None,
    reference_split: Annotated[str, typer.Option(help="Which part of the reference.")] = "train",
    features: Annotated[
        str, typer.Option(help="pixels, inception=FILE (FID with the 2015 weights), clip=FOLDER, dinov2=FOLDER.")
    ] = "pixels",
    n: Annotated[
        int | None,
        typer.Option(
            "--n", "-n", help="How many samples; by default all, of a model as many as real images, 10,000 at most."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of SAMPLES.")] = "train",
    resolution: Annotated[str | None, typer.Option(help="Bring images that are read to N or HxW.")] = None,
    channels: Annotated[int | None, typer.Option(help="Bring images that are read to 1, 3 or 4 channels.")] = None,
    resize: Annotated[str, typer.Option(help="adm, bicubic, lanczos, box, nearest.")] = "adm",
    train: Annotated[str | None, typer.Option(help="Training images, for memorisation.")] = None,
    train_split: Annotated[str, typer.Option(help="Which part of them.")] = "train",
    judge: Annotated[str | None, typer.Option(help="svc: learns the reference's classes, reads the samples'.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--num_inference_steps", help="Solver steps.")] = None,
    solver: Annotated[str | None, typer.Option(help="ddpm, ddim, dpm++2m, …")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "--guidance_scale", help="1: none.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's η, 0..1.")] = None,
    spacing: Annotated[str | None, typer.Option(help="trailing, leading, linspace, …")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples made at once.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    comparison: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A.json B.json", help="Two --out files.")
    ] = None,
    varied: Annotated[
        list[str] | None, typer.Option(help="What --compare may find different, e.g. sampling.steps. Repeatable.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="ddim, guidance or solvers: the model in many ways, into the folder --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write figures and protocols as JSON.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """Measure a model or finished samples against real images; or compare two results if their protocols agree."""
    from carrara.cli.data import parse_resolution
    from carrara.errors import UserError
    from carrara.evaluation.features import open_features
    from carrara.evaluation.protocol import Size
    from carrara.model import DiffusionModel

    given = _given(context)
    if comparison is not None:
        if given - COMPARING:
            raise UserError(f"--compare reads two finished results: leave {_spelt(given - COMPARING)} out.")
        show_comparison(comparison, varied or [], json_output)
        return
    if subject is None or reference is None:
        raise UserError("give MODEL or SAMPLES and --reference DATA, or --compare A.json B.json.")
    _refuse_ignored(given, subject, reference, judge)
    _refuse_table(given, subject, table)
    _refuse_device(device)
    network = open_features(features, device)
    size = Size(None if resolution is None else parse_resolution(resolution), channels, resize)
    choices = {"steps": steps, "solver": solver, "guidance": guidance, "eta": eta, "spacing": spacing, "seed": seed}
    with _bar(json_output) as bar:
        real = open_reference(bar, reference, reference_split, network, size)
        known = None if train is None else open_training(bar, train, train_split, network, size)
        bench = Bench(bar, real, known, network, judge is not None)
        if table is None or out is None:
            figures = bench.measure(open_samples(subject, split, n, real, size, device, batch_size, choices))
        else:
            model, count = DiffusionModel.load(subject, device), samples_wanted(n, real)
            fill_table(bench, table, model, out, count, batch_size, choices)
            return
    tell(figures, out, json_output)


@dataclass(frozen=True)
class Bench:
    """What all samples are measured against, and with."""

    bar: Progress
    reference: Reference
    train: Reference | None
    features: Features
    judge: bool

    def measure(self, samples: Pictures) -> Measurements:
        """Every figure of these samples; the bar shows how far they are."""
        from carrara.evaluation import protocol

        return protocol.evaluate(
            shown(self.bar, "samples", samples), self.reference, self.features, self.train, self.judge
        )

    def protocol(self) -> dict[str, str | bool | None]:
        """What decides the figures besides the samples."""
        from carrara.evaluation.protocol import features_of

        train = None if self.train is None else self.train.content
        return features_of(self.features) | {"reference": self.reference.content, "train": train, "judge": self.judge}


def fill_table(
    bench: Bench,
    table: str,
    model: DiffusionModel,
    out: Path,
    count: int,
    batch_size: int,
    choices: dict[str, Any],
) -> None:
    """Measure the model in every way of the table, each kept in `out` as soon as it is known."""
    from carrara.cli import evaluate_table
    from carrara.evaluation import protocol
    from carrara.evaluation.features.checksum import tensors_checksum

    plan = evaluate_table.cells(table, model.schedule)
    weights = tensors_checksum(model.network.state_dict())
    own = {key: value for key, value in choices.items() if key not in evaluate_table.TABLES[table]}
    about = {"table": table, "model": weights, "n": count, **own, **bench.protocol()}

    def measure(cell: evaluate_table.Cell) -> Measurements:
        return bench.measure(protocol.model_pictures(model, cell.line, count, batch_size, **{**own, **cell.choices}))

    evaluate_table.fill(out, plan, about, measure)
    bench.bar.console.print((out / "table.md").read_text(encoding="utf-8"), highlight=False, markup=False)


def _given(context: typer.Context) -> set[str]:
    """The options that the user typed."""
    return {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _spelt(names: set[str]) -> str:
    words = {"subject": "MODEL|SAMPLES", "json_output": "--json", "comparison": "--compare"}
    return ", ".join(sorted(words.get(name, f"--{name.replace('_', '-')}") for name in names))


def _refuse_ignored(given: set[str], subject: str, reference: str, judge: str | None) -> None:
    """Raises UserError for an option that would change nothing."""
    from carrara.errors import UserError
    from carrara.evaluation.protocol import holds_statistics

    if judge not in (None, "svc"):
        raise UserError(f"there is no judge '{judge}': the known one is svc.")
    if "varied" in given:
        raise UserError("--varied belongs to --compare: leave it out.")
    if not _is_model(subject) and given & SAMPLING:
        raise UserError(f"{_spelt(given & SAMPLING)}: only for models, and {subject} is no run or model folder.")
    if _is_model(subject) and "split" in given:
        raise UserError(f"--split: only for finished samples, and {subject} is a model.")
    if "train_split" in given and "train" not in given:
        raise UserError("--train-split belongs to --train: give both.")
    if "resize" in given and "resolution" not in given:
        raise UserError("--resize says how images come to --resolution: give both.")
    if holds_statistics(reference):
        nothing_read = _is_model(subject) and "train" not in given
        unused = given & ({"reference_split", "resolution", "channels"} if nothing_read else {"reference_split"})
        if unused:
            raise UserError(f"{_spelt(unused)}: only for images, and {reference} holds their statistics.")


def _refuse_table(given: set[str], subject: str, table: str | None) -> None:
    """Raises UserError for a table that cannot be made, or an option that it sets itself."""
    from carrara.cli.evaluate_table import TABLES
    from carrara.errors import UserError, nearest

    if table is None:
        return
    if table not in TABLES:
        raise UserError(f"there is no table '{table}': {nearest(table, TABLES)}")
    if not _is_model(subject):
        raise UserError(f"a table samples a model in many ways, and {subject} is no run or model folder.")
    if given & (TABLES[table] | {"json_output"}):
        raise UserError(f"--table {table} takes no {_spelt(given & (TABLES[table] | {'json_output'}))}: leave it out.")
    if "out" not in given:
        raise UserError("--table keeps each row as it goes: give the folder with --out.")


def _refuse_device(device: str) -> None:
    """Raises UserError where nothing can be computed there."""
    import torch

    from carrara.errors import UserError

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        raise UserError(f"there is no device '{device}' here: use cpu.") from None


def _is_model(subject: str) -> bool:
    folder = Path(subject)
    return (folder / "config.json").is_file() or (folder / "model").is_dir()


def open_reference(bar: Progress, path: str, split: str, features: Features, size: Size) -> Reference:
    """What the samples are measured against, read."""
    from carrara.evaluation import protocol

    if protocol.holds_statistics(path):
        return protocol.statistics_reference(path, features)
    pictures = protocol.data_pictures(path, split, size=size)
    return protocol.collected_reference(shown(bar, "reference", pictures), features)


def open_training(bar: Progress, path: str, split: str, features: Features, size: Size) -> Reference:
    """The training images, every one of them kept: a copy may be of any."""
    from carrara.evaluation import protocol

    pictures = protocol.data_pictures(path, split, size=size)
    return protocol.collected_reference(shown(bar, "training images", pictures), features, rows=pictures.count)


def open_samples(
    subject: str,
    split: str,
    n: int | None,
    reference: Reference,
    size: Size,
    device: str,
    batch_size: int,
    choices: dict[str, Any],
) -> Pictures:
    """A model's samples, by default as many as there are real images (10,000 at most), or finished ones."""
    from carrara.evaluation import protocol
    from carrara.model import DiffusionModel

    if not _is_model(subject):
        return protocol.data_pictures(subject, split, n, size)
    model, count = DiffusionModel.load(subject, device), samples_wanted(n, reference)
    return protocol.model_pictures(model, subject, count, batch_size, **choices)


def samples_wanted(n: int | None, reference: Reference) -> int:
    """How many samples a model makes: `n`, or as many as there are real images, 10,000 at most."""
    from carrara.evaluation.collect import ROWS

    return min(reference.count or ROWS, ROWS) if n is None else n


def _bar(quiet: bool) -> Progress:
    from carrara.cli.console import progress_bar

    bar = progress_bar()
    bar.disable = quiet
    return bar


def shown(bar: Progress, what: str, pictures: Pictures) -> Pictures:
    """The same pictures; the bar moves as they are made or read."""
    task = bar.add_task(what, total=pictures.count, note="")

    def batches() -> Iterator[Tensor]:
        for images in pictures.batches():
            yield images
            bar.advance(task, len(images))

    return replace(pictures, batches=batches)


def tell(figures: Measurements, out: Path | None, json_output: bool) -> None:
    """Print the figures, each with its interval, then what they share of their protocol; write them if asked."""
    from rich.table import Table

    from carrara.cli.console import console, table
    from carrara.evaluation import stamp
    from carrara.files import write_whole

    text = stamp.to_json(figures)
    if out is not None:
        write_whole(out, (text + "\n").encode())
    if json_output:
        print(text)
        return
    rows = Table("figure", "value", "95 % interval", "settings", "note", box=None, pad_edge=False)
    for name, figure in figures.items():
        settings = ", ".join(f"{key} {value}" for key, value in figure.stamp.settings.items())
        rows.add_row(name, f"{figure.value:.5g}", _range(figure.interval), settings, figure.note)
    console.print(rows, highlight=False)
    shared = next(iter(figures.values())).stamp.entries()
    console.print()
    console.print(table({key: value for key, value in shared.items() if not key.startswith("settings.")}))
    if out is not None:
        console.print(f"figures and protocols: {out}", highlight=False)


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.5g} … {interval.high:.5g}"


def show_comparison(files: tuple[Path, Path], varied: list[str], json_output: bool) -> None:
    """Print two results side by side.

    Raises:
        UserError: their protocols differ, and where; or a file that does not hold figures.
    """
    import json

    from rich.table import Table

    from carrara.cli.console import console
    from carrara.evaluation import compare, stamp

    pairs = compare(stamp.load(files[0]), stamp.load(files[1]), varied)
    if json_output:
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
