"""The pages of `carrara evaluate`: what was measured of a model or of samples, and what a table holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from carrara.evaluation import tables
from carrara.evaluation.neighbours import nearest
from carrara.evaluation.plots import LineChart, Series
from carrara.evaluation.protocol import Evaluation
from carrara.evaluation.reference import Reference
from carrara.evaluation.report import (
    Block,
    ImageGrid,
    KeyValues,
    MetricRow,
    MetricTable,
    Pairs,
    Report,
    Section,
    Table,
)
from carrara.evaluation.stamp import Measurement, Measurements
from carrara.images import from_uint8

NEIGHBOURS = 16
LARGE = 100
"""Above this a chart of many times is drawn with a logarithmic axis."""


def of_evaluation(
    subject: str,
    found: Evaluation,
    reference: Reference,
    train: Reference | None = None,
    filled: Sequence[tables.Table] = (),
) -> Report:
    """Metrics, samples, their nearest real pictures, classes, curves and tables on one page."""
    whole = {name: metric for name, metric in found.metrics.items() if not name.endswith("]")}
    single = {name: metric for name, metric in found.metrics.items() if name.endswith("]")}
    sections = [
        Section("Metrics", [MetricTable([as_row(*item) for item in whole.items()])], "Each with its protocol."),
        Section("Samples", [sample_grid(found)], "Not picked by hand: the first ones."),
    ]
    sections += _neighbours(found, train or reference, "training" if train else "reference")
    if single:
        sections.append(Section("Class by class", [_classes(single)], "Which class is drawn worst?"))
    if "bits_per_dimension" in whole:
        sections.append(_bits(whole["bits_per_dimension"]))
    sections += [section for table in filled for section in of_cells(table)]
    first = next(iter(found.metrics.values())).stamp
    versions = {name: str(version) for name, version in first.versions.items()}
    sections.append(Section("Versions", [KeyValues("Versions", versions)]))
    return Report(Path(subject).name, f"Measured against {Path(reference.name).name}.", sections)


def of_table(table: tables.Table) -> Report:
    """A table with its curves and a few samples of every cell."""
    about: dict[str, str | float] = {key: str(value) for key, value in table.protocol.items() if value is not None}
    protocol = Section("Protocol", [KeyValues("All cells share", about)])
    title = f"One model, {len(table.cells)} ways of sampling"
    return Report(title, f"{tables.about(table)}.", [*of_cells(table), protocol])


def as_row(name: str, measured: Measurement) -> MetricRow:
    """A measurement as a page shows it."""
    interval = None if measured.interval is None else (measured.interval.low, measured.interval.high)
    return MetricRow(
        name.replace("_", " "),
        measured.value,
        decimals=4,
        interval=interval,
        protocol=measured.stamp.text(),
        comment=measured.note,
    )


def by_class(metrics: Measurements) -> tuple[list[str], list[list[str]]]:
    """Metrics named "metric[class]" as a table: its columns, and a row for each class."""
    parted = {name: name[:-1].split("[", 1) for name in metrics}
    columns = list(dict.fromkeys(metric for metric, _ in parted.values()))
    classes = list(dict.fromkeys(own for _, own in parted.values()))
    rows = [[own, *(tables.with_interval(metrics.get(f"{column}[{own}]")) for column in columns)] for own in classes]
    return [f"{column} (95 % interval)" for column in columns], rows


def sample_grid(found: Evaluation) -> ImageGrid:
    """The first samples; one column for each class where there are few."""
    images = from_uint8(found.samples.first)
    places: dict[str, list[int]] = {}
    for i, name in enumerate((found.labels or ())[: len(images)]):
        places.setdefault(name, []).append(i)
    depth = min(map(len, places.values()), default=0)
    if not 1 < len(places) <= 16 or len(places) < len(set(found.labels or ())):
        return ImageGrid("Samples", images, 10, "The first samples.")
    images = images[[of_class[row] for row in range(depth) for of_class in places.values()]]
    return ImageGrid("Samples", images, len(places), "One column for each requested class.", list(places))


def _neighbours(found: Evaluation, real: Reference, kind: str) -> list[Section]:
    if real.images is None or real.pictures is None:
        return []
    rows = found.samples.rows[:NEIGHBOURS].double()
    rows = rows[: len(found.samples.first)]
    index, distance = nearest(rows, real.images.rows.double())
    pictures = real.pictures
    others = torch.cat([pictures.make(range(i, i + 1)) for i in index.tolist()])
    block = Pairs(
        f"Nearest {kind} image of {len(rows)} samples",
        from_uint8(found.samples.first[: len(rows)]),
        others,
        "sample",
        f"nearest {kind} image",
        [f"{d:.3g}" for d in distance.tolist()],
        "Below each pair their distance in the features; 0 would be a copy.",
    )
    return [Section("Nearest neighbours", [block], "Is anything a copy?")]


def _classes(metrics: Measurements) -> Table:
    columns, rows = by_class(metrics)
    return Table("Metrics of each class", ["class", *columns], rows, "Each class against the real pictures of it.")


def _bits(metric: Measurement) -> Section:
    """The terms of the bound and the errors behind them, over the noise level."""
    parts: Any = metric.details
    times = parts["times"]
    terms = LineChart(
        "Bits of every step",
        [Series("term", times, parts["terms"])],
        "t",
        parts["unit"],
        f"What each step of the chain adds to {parts['total']:.3f} {parts['unit']}; the last, at t = {times[-1]:g}, is "
        f"the reconstruction. The prior adds {parts['prior']:.2g}.",
        log_x=len(times) > LARGE,
        log_y=True,
    )
    errors = LineChart(
        "Errors at every noise level",
        [Series("of x̂₀", times, parts["x0_errors"]), Series("of ε̂", times, parts["eps_errors"])],
        "t",
        "mean squared error",
        "How far the predicted clean image and noise are from the true ones.",
        log_x=len(times) > LARGE,
        log_y=True,
    )
    return Section("Bits per dimension", [terms, errors], "Where in the chain are the bits lost?")


def of_cells(table: tables.Table) -> list[Section]:
    """The sections of a table: metrics, curves, samples, and what was published."""
    columns = ["", *(f"{place:g}" for place in table.places)]
    blocks: list[Block] = [tables.chart(table)]
    for name in table.shown:
        rows = [
            [line, *(tables.with_interval(table.metric(name, line, p)) for p in table.places)] for line in table.lines
        ]
        caption = f"By {table.axis}, with 95 % intervals. {' '.join(f'{note}.' for note in table.notes)}"
        blocks.append(Table(name.replace("_", " "), columns, rows, caption))
    sections = [Section(f"Table '{table.kind}'", blocks)]
    sheets = _sheets(table)
    if sheets is not None:
        caption = f"The first {tables.SHEET} samples of every cell: the same noise and the same classes everywhere."
        grid = ImageGrid("Samples of every cell", sheets, len(columns) - 1, caption, columns[1:], table.lines)
        sections.append(Section("What it looks like", [grid]))
    for data, published in tables.published(table):
        heads = ["steps", *(f"{n:,}" for n in tables.PUBLISHED_STEPS)]
        sections.append(
            Section(f"Published: {data}", [Table(f"FID on {data}", heads, published, tables.PUBLISHED_TITLE)])
        )
    return sections


def _sheets(table: tables.Table) -> Tensor | None:
    """The kept picture of every cell, [N, C, H, W]; None where a table has cells without."""
    files = [table.folder / f"{cell.stem}.png" for cell, _ in table.cells]
    if not all(file.is_file() for file in files):
        return None
    arrays = [np.asarray(Image.open(file)) for file in files]
    pixels = np.stack([array[..., None] if array.ndim == 2 else array for array in arrays])
    return from_uint8(torch.from_numpy(pixels))
