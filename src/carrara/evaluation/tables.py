"""One model sampled in many ways, each cell kept as soon as it is known, so that an interrupted table goes on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carrara import images as pictures
from carrara.distributed import run_on_rank0
from carrara.errors import UserError
from carrara.evaluation import plots, stamp
from carrara.evaluation.measure import frechet_name
from carrara.evaluation.plots import LineChart, Series
from carrara.evaluation.protocol import Evaluation
from carrara.evaluation.stamp import Measurement, Measurements
from carrara.files import write_whole
from carrara.images import from_uint8
from carrara.process import Schedule
from carrara.solvers import DDIM

GUIDANCE = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5)
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the table that compares guidance by a classifier with guidance without."""
SOLVERS = ("ddpm", "ddim", "euler", "heun", "dpm++2m", "dpm++3m", "unipc", "deis", "plms")
TABLES = {
    "ddim": {"solver", "steps", "eta"},
    "guidance": {"guidance", "classifier_scale"},
    "solvers": {"solver", "steps", "eta"},
}
"""The tables, and the choices of sampling that each makes itself."""

DEFAULTS: dict[str, dict[str, Any]] = {"ddim": {"spacing": "leading"}}
"""What else a table takes from its paper, unless the user gives another: leading is the linear τ of DDIM's programs
(their CIFAR-10 column is quadratic). σ̂ is only as bad as published where the grid has small steps close to the clean
image, after which no noise can be taken away any more."""

ETAS = {f"η {eta:g}": DDIM(eta=eta) for eta in (0.0, 0.2, 0.5, 1.0)} | {"σ̂": DDIM(eta=1.0, noise="large")}
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "CIFAR-10": {
        "η 0": (13.36, 6.84, 4.67, 4.16, 4.04),
        "η 0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
        "η 0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
        "η 1": (41.07, 18.36, 8.01, 5.78, 4.73),
        "σ̂": (367.43, 133.37, 32.72, 9.99, 3.17),
    },
    "CelebA": {
        "η 0": (17.33, 13.73, 9.17, 6.53, 3.51),
        "η 0.2": (17.66, 14.11, 9.51, 6.79, 3.64),
        "η 0.5": (19.86, 16.06, 11.01, 8.09, 4.28),
        "η 1": (33.12, 26.03, 18.48, 13.93, 5.98),
        "σ̂": (299.71, 183.83, 71.71, 45.20, 3.26),
    },
}
"""FID in 10, 20, 50, 100 and 1,000 steps: table 1 of Song et al. 2021, "Denoising Diffusion Implicit Models"."""
PUBLISHED_STEPS = (10, 20, 50, 100, 1000)
PUBLISHED_TITLE = "Published for comparison of the shape: FID of other models, in other features (Song et al. 2021)"

SHEET = 9
"""Samples of each cell that are kept as a picture."""


@dataclass(frozen=True)
class Cell:
    """One way of sampling: its line, its place on the axis, and the arguments of `DiffusionModel.sample`."""

    line: str
    place: float
    choices: dict[str, Any]

    @property
    def stem(self) -> str:
        """Its metrics and its picture are stored under this name."""
        return f"{self.line},_{self.place:g}".replace(" ", "_")


@dataclass(frozen=True)
class Table:
    """A table that is filled.

    Attributes:
        kind: one of `TABLES`.
        cells: each with its metrics, line by line.
        protocol: what all cells share.
        folder: where it is kept, the cells' pictures among it.
    """

    kind: str
    cells: Sequence[tuple[Cell, Measurements]]
    protocol: Mapping[str, Any]
    folder: Path

    @property
    def distance(self) -> str:
        """The name of its Fréchet distance."""
        return frechet_name(str(self.protocol["features"]))

    @property
    def axis(self) -> str:
        """What the places are."""
        return "guidance scale" if self.kind == "guidance" else "steps"

    @property
    def lines(self) -> list[str]:
        """The names of the lines, in order."""
        return list(dict.fromkeys(cell.line for cell, _ in self.cells))

    @property
    def places(self) -> list[float]:
        """The columns, in order."""
        return sorted({cell.place for cell, _ in self.cells})

    @property
    def shown(self) -> list[str]:
        """The metrics that are printed: what sets the ways of sampling apart."""
        wanted = (self.distance, "precision", "recall", "class_accuracy")
        return [name for name in wanted if all(name in metrics for _, metrics in self.cells)]

    @property
    def notes(self) -> list[str]:
        """What must be known of the distances, each sentence once."""
        return list(dict.fromkeys(f[self.distance].note for _, f in self.cells if f[self.distance].note))

    def metric(self, name: str, line: str, place: float) -> Measurement | None:
        """One metric of one cell, where there is that cell."""
        return next((f[name] for cell, f in self.cells if (cell.line, cell.place) == (line, place)), None)


def cells(table: str, schedule: Schedule, classifier: bool = False, null: bool = True) -> list[Cell]:
    """The cells of a table, line by line.

    "ddim" is table 1 of Song et al. 2021: η, and the large noise σ̂, by the number of steps, T among them.
    "guidance" with a classifier compares three ways to p(x)·p(y|x)^w (Dhariwal & Nichol 2021, table 4 and figure 4):
    by the classifier, from a model without condition; classifier-free; and half of w by each.

    Args:
        classifier: whether there is one.
        null: whether the model has a null condition; if not, the classifier guides it from p(x|y).
    """
    if table == "guidance" and classifier:
        led = [Cell("classifier", w, {"guidance": 0.0 if null else 1.0, "classifier_scale": w}) for w in SCALES]
        if not null:
            return led
        free = [Cell("classifier-free", w, {"guidance": w, "classifier_scale": 0.0}) for w in SCALES]
        return led + free + [Cell("both", w, {"guidance": w / 2, "classifier_scale": w / 2}) for w in SCALES]
    if table == "guidance":
        return [Cell("own solver", scale, {"guidance": scale}) for scale in GUIDANCE]
    last = int(schedule.final_time)
    if table == "solvers":
        counts = [n for n in (5, 10, 20, 50) if n <= last]
        return [Cell(word, n, {"solver": word, "steps": n}) for word in SOLVERS for n in counts]
    counts = [*(n for n in (10, 20, 50, 100) if n < last), last]
    return [Cell(line, n, {"solver": solver, "steps": n}) for line, solver in ETAS.items() for n in counts]


def fill(
    folder: Path, kind: str, plan: list[Cell], protocol: dict[str, Any], measure: Callable[[Cell], Evaluation]
) -> Table:
    """The metrics of every cell: those that `folder` holds are read, the others measured and kept there.

    Args:
        protocol: what all cells share; a folder that was started with another one is refused.

    Raises:
        UserError: the folder holds another table.
    """
    run_on_rank0(lambda: _start(folder, kind, plan, protocol))
    filled: list[tuple[Cell, Measurements]] = []
    for cell in plan:
        kept = folder / f"{cell.stem}.json"
        metrics = run_on_rank0(lambda kept=kept: stamp.load(kept) if kept.is_file() else None)  # type: ignore[misc]
        if metrics is None:
            found = measure(cell)
            run_on_rank0(lambda cell=cell, found=found: _keep(folder, cell, found))  # type: ignore[misc]
            metrics = found.metrics
        filled.append((cell, metrics))
    return Table(kind, filled, protocol, folder)


def _start(folder: Path, kind: str, plan: list[Cell], protocol: Mapping[str, Any]) -> None:
    places = [[cell.line, cell.place] for cell in plan]
    header = json.loads(json.dumps({"table": kind, "cells": places, "protocol": protocol}))
    path = folder / "table.json"
    if path.is_file() and _header(folder) != header:
        raise UserError(
            f"{path} is of a table of another protocol: give another --out folder.", key="out", code="conflict"
        )
    write_whole(path, (json.dumps(header, indent=2, sort_keys=True) + "\n").encode())


def _header(folder: Path) -> dict[str, Any]:
    """What `table.json` contains.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "table.json"
    if not path.is_file():
        raise UserError(
            f"{folder} contains no table: fill one with carrara sweep --out {folder}.", key=str(path), code="missing"
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        return {"table": header["table"], "cells": header["cells"], "protocol": stamp.renamed(header["protocol"])}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}).", key=str(path), code="damaged") from None


def _keep(folder: Path, cell: Cell, found: Evaluation) -> None:
    """The picture first: a cell counts as known once its metrics are there."""
    sheet = pictures.grid(from_uint8(found.samples.first[:SHEET]))
    pictures.save_png(sheet, folder / f"{cell.stem}.png")
    write_whole(folder / f"{cell.stem}.json", (stamp.to_json(found.metrics) + "\n").encode())


def read(folder: Path) -> Table:
    """A table that was filled before.

    Raises:
        UserError: there is none, or cells are missing.
    """
    about = _header(folder)
    plan = [Cell(line, place, {}) for line, place in about["cells"]]
    missing = [cell.stem for cell in plan if not (folder / f"{cell.stem}.json").is_file()]
    if missing:
        raise UserError(
            f"the table in {folder} lacks {len(missing)} cells, first '{missing[0]}': fill it first.",
            key=str(folder),
            code="missing",
        )
    filled = [(cell, stamp.load(folder / f"{cell.stem}.json")) for cell in plan]
    return Table(about["table"], filled, about["protocol"], folder)


# ---- how it is shown ----------------------------------------------------------------------------------------


def write(table: Table) -> None:
    """`table.md`, `table.csv` and `table.svg` into the table's folder."""
    write_whole(table.folder / "table.md", markdown(table).encode())
    write_whole(table.folder / "table.csv", comma_separated(table).encode())
    write_whole(table.folder / "table.svg", plots.standalone(chart(table), 760, 420).encode())


def chart(table: Table) -> LineChart:
    """The distance of every line over the axis, with its intervals."""
    name, lines = table.distance, []
    for line in table.lines:
        points = [(cell.place, metrics[name]) for cell, metrics in table.cells if cell.line == line]
        ends = [(f.interval.low, f.interval.high) if f.interval else (f.value, f.value) for _, f in points]
        low, high = zip(*ends, strict=True)
        lines.append(Series(line, [place for place, _ in points], [f.value for _, f in points], low, high))
    caption = f"{name} with 95 % intervals, {about(table)}: lower is better."
    steps = table.kind != "guidance"
    return LineChart(f"Table '{table.kind}'", lines, table.axis, name, caption, log_x=steps, log_y=steps)


def about(table: Table) -> str:
    """The protocol in a few words; the whole of it is in `table.json` and in every cell."""
    known = table.protocol
    guided = "" if known.get("guidance") is None else f", guidance {known['guidance']:g}"
    return f"n = {known['n']:,}, features {known['features']}{guided}, seed {known['seed']}"


def published(table: Table) -> list[tuple[str, list[list[str | float | None]]]]:
    """The paper's values next to a table of DDIM: (title, rows); nothing next to others."""
    if table.kind != "ddim":
        return []
    return [(data, [[line, *values] for line, values in lines.items()]) for data, lines in PUBLISHED.items()]


def markdown(table: Table) -> str:
    """Every metric shown, with its interval, lines by columns, then the protocol."""
    columns = [f"{place:g}" for place in table.places]
    text: list[str] = []
    for name in table.shown:
        text += [f"| {name}, {table.axis}: | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for line in table.lines:
            found = [with_interval(table.metric(name, line, place)) for place in table.places]
            text.append(f"| {line} | " + " | ".join(found) + " |")
        text.append("")
    protocol = ", ".join(f"{key} {value}" for key, value in table.protocol.items() if value not in (None, ""))
    text += [f"95 % intervals; {protocol}.", *(f"{note}." for note in table.notes), ""]
    for title, rows in published(table):
        steps = [f"{n:,}" for n in PUBLISHED_STEPS]
        text += [f"{PUBLISHED_TITLE}, {title}:", "", f"| steps: | {' | '.join(steps)} |", "|---" * 6 + "|"]
        text += ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]
    return "\n".join(text)


def with_interval(metric: Measurement | None) -> str:
    """A metric as tables print it."""
    if metric is None:
        return ""
    limits = metric.interval and f" ({metric.interval.low:.4g} … {metric.interval.high:.4g})"
    return f"{metric.value:.4g}{limits or ''}"


def comma_separated(table: Table) -> str:
    """Every metric of every cell, one a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", table.axis, "metric", "value", "low", "high"])
    for cell, metrics in table.cells:
        for name, metric in sorted(metrics.items()):  # as they are read back from a file
            limits = ("", "") if metric.interval is None else (metric.interval.low, metric.interval.high)
            writer.writerow([cell.line, f"{cell.place:g}", name, metric.value, *limits])
    return text.getvalue()
