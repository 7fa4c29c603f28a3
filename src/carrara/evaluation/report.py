"""A report as one self-contained HTML file: plain data in, no network, no script, equal bytes for equal data.

A `Report` is a list of `Section`s, a section a list of blocks. Every block is a frozen dataclass of plain
data; `report.html.jinja` next to this file lays each out. Pictures go in as base64 PNG, charts as
inline SVG (`plots.py`).
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation import plots
from carrara.evaluation.plots import LineChart, Series, value_text
from carrara.files import write_whole
from carrara.images import to_pil

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = [
    "Block",
    "Code",
    "FilmStrip",
    "Headlines",
    "ImageGrid",
    "KeyValues",
    "LineChart",
    "MetricRow",
    "MetricTable",
    "Pairs",
    "Report",
    "Section",
    "Series",
    "SideBySide",
    "Table",
    "Text",
]


@dataclass(frozen=True)
class MetricRow:
    """One measured number, with what it must reach and how it was measured.

    Attributes:
        name: what was measured.
        value: the number, in `unit`; one that is not finite reaches no target.
        unit: printed after the number ("%", "s", "bits/dim"); empty for none.
        decimals: printed digits after the point; more are printed where rounding would hide a missed target.
        interval: lower and upper end of its confidence interval, in `unit`.
        at_least: the target, where more is better.
        at_most: the target, where less is better.
        protocol: n, reference, features, sampler, steps, guidance, seed: what makes the number comparable.
        comment: what to compare it with, or why it is what it is.
    """

    name: str
    value: float
    unit: str = ""
    decimals: int = 2
    interval: tuple[float, float] | None = None
    at_least: float | None = None
    at_most: float | None = None
    protocol: str = ""
    comment: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value reaches its target; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        return self._reaches(self.value)

    def _reaches(self, value: float) -> bool:
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return math.isfinite(value) and low <= value <= high

    @property
    def value_text(self) -> str:
        """The value as printed, without its unit."""
        if not math.isfinite(self.value):
            return value_text(self.value)
        decimals = self.decimals
        while self.reached is False and self._reaches(round(self.value, decimals)):
            decimals += 1
        return f"{self.value:,.{decimals}f}".replace("-", "−")

    @property
    def interval_text(self) -> str:
        """The interval as printed, without its unit; empty without one."""
        if self.interval is None:
            return ""
        return " to ".join(f"{end:,.{self.decimals}f}".replace("-", "−") for end in self.interval)

    @property
    def target_text(self) -> str:
        """The target as printed, with its unit; empty without one."""
        ends = (("≥", self.at_least), ("≤", self.at_most))
        words = [f"{sign}\u00a0{value_text(end)}" for sign, end in ends if end is not None]
        return " and ".join(words) + (f"\u00a0{self.unit}" if words and self.unit else "")


@dataclass(frozen=True)
class Text:
    """Running text; an empty line begins a new paragraph."""

    kind: ClassVar[str] = "text"
    text: str

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs, without surrounding space."""
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]


@dataclass(frozen=True)
class Headlines:
    """The few metrics that matter most, large, each with a mark where it has a target."""

    kind: ClassVar[str] = "headlines"
    metrics: Sequence[MetricRow]


@dataclass(frozen=True)
class MetricTable:
    """Metrics with interval, target and protocol, one row each.

    Attributes:
        metrics: the rows.
        interval_name: heading of the interval column, with its level.
    """

    kind: ClassVar[str] = "metric_table"
    metrics: Sequence[MetricRow]
    interval_name: str = "95 % interval"


@dataclass(frozen=True)
class Table:
    """A plain table; numbers are printed to four digits and aligned to the right.

    Attributes:
        title: a few words above it.
        columns: headings; the first column names the rows.
        rows: as many cells as columns each; None is an empty cell.
        caption: one sentence on what is shown and how to read it.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UserError(
                    f"the table '{self.title}' has a row of {len(row)} cells for {len(self.columns)} columns.",
                    key=self.title,
                    code="shape",
                )


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Pictures in rows.

    Attributes:
        title: a few words above it; also the alternative text.
        images: float [N, C, H, W] in [-1, 1], C = 1, 3 or 4, row by row.
        columns: pictures in a row.
        caption: one sentence on what is shown and how to read it.
        column_labels: a name over each column (the classes), or none. A grid with labels keeps its columns on
            every screen; one without flows.
        row_labels: a name before each row, or none.
        captions: a few words under each picture, or none.
        scale: page pixels for each picture pixel where there is room; None chooses about 80 page pixels.
    """

    kind: ClassVar[str] = "image_grid"
    title: str
    images: Tensor
    columns: int
    caption: str
    column_labels: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    captions: Sequence[str] = ()
    scale: int | None = None

    def __post_init__(self) -> None:
        _check_images(self.title, self.images)
        _check_count(self.title, "column labels", self.column_labels, self.columns, optional=True)
        rows = -(-len(self.images) // self.columns)
        _check_count(self.title, "row labels", self.row_labels, rows, optional=True)
        _check_count(self.title, "captions", self.captions, len(self.images), optional=True)

    @property
    def labelled(self) -> bool:
        """Whether the columns must stay where they are."""
        return bool(self.column_labels or self.row_labels)

    def name(self, index: int) -> str:
        """The alternative text of one picture."""
        row, column = divmod(index, self.columns)
        words = [self.title]
        words += [self.row_labels[row]] if self.row_labels else []
        words += [self.column_labels[column]] if self.column_labels else []
        return ", ".join([*words, self.captions[index] if self.captions else f"picture {index + 1}"])


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures two by two: each sample next to its nearest training picture.

    Attributes:
        title: a few words above it.
        left: float [N, C, H, W] in [-1, 1].
        right: the same shape.
        left_name: what the left pictures are, in the singular ("sample").
        right_name: what the right ones are.
        captions: a few words under each pair (its distance).
        caption: one sentence on what is shown and how to read it.
        scale: page pixels for each picture pixel; None chooses about 96 page pixels for a picture.
    """

    kind: ClassVar[str] = "pairs"
    title: str
    left: Tensor
    right: Tensor
    left_name: str
    right_name: str
    captions: Sequence[str]
    caption: str
    scale: int | None = None

    def __post_init__(self) -> None:
        _check_images(self.title, self.left)
        _check_images(self.title, self.right)
        _check_count(self.title, "right pictures", self.right, len(self.left))
        _check_count(self.title, "captions", self.captions, len(self.left))


@dataclass(frozen=True, eq=False)
class FilmStrip:
    """One picture being denoised: x_t above, the model's x̂_0 below, from left to right.

    Attributes:
        title: a few words above it.
        noisy: x_t, float [K, C, H, W]; shown clamped to [-1, 1].
        clean: the clean picture x̂_0 the model sees in x_t, the same shape.
        times: t of each frame.
        caption: one sentence on what is shown and how to read it.
        scale: page pixels for each picture pixel; None chooses about 64 page pixels for a picture.
    """

    kind: ClassVar[str] = "film_strip"
    title: str
    noisy: Tensor
    clean: Tensor
    times: Sequence[float]
    caption: str
    scale: int | None = None

    def __post_init__(self) -> None:
        _check_images(self.title, self.noisy)
        _check_images(self.title, self.clean)
        _check_count(self.title, "clean pictures", self.clean, len(self.noisy))
        _check_count(self.title, "times", self.times, len(self.noisy))

    @property
    def halves(self) -> list[range]:
        """The frames of the first and of the second half, which a phone shows one under the other.

        Up to six frames stay in one row.
        """
        count = len(self.times)
        middle = -(-count // 2) if count > 6 else count
        return [half for half in (range(middle), range(middle, count)) if half]


@dataclass(frozen=True)
class Code:
    """Text kept as it is, in a fixed-width font (a recipe).

    Attributes:
        title: a few words above it.
        text: the lines.
    """

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class KeyValues:
    """Names and values (versions, timings).

    Attributes:
        title: a few words above them.
        values: in this order; numbers are printed to four digits.
    """

    kind: ClassVar[str] = "key_values"
    title: str
    values: Mapping[str, str | float]


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Blocks next to each other where the page is wide enough, else one under the other."""

    kind: ClassVar[str] = "side_by_side"
    blocks: Sequence[Block]


Block = (
    Text | Headlines | MetricTable | Table | ImageGrid | Pairs | FilmStrip | LineChart | Code | KeyValues | SideBySide
)


@dataclass(frozen=True, eq=False)
class Section:
    """A heading with what belongs under it.

    Attributes:
        title: the heading; also its entry in the page's contents.
        blocks: what it shows, from top to bottom.
        lead: the question that it answers, under the heading; empty for none.
    """

    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """The whole page.

    Attributes:
        title: the page's title.
        subtitle: one or two sentences under it.
        sections: the sections, in order.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]

    def html(self) -> str:
        """The page: one HTML document that refers to nothing outside itself."""
        return _template().render(report=self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page; a file that is there is replaced only once the new one is complete.

        Raises:
            UserError: the file cannot be written.
        """
        write_whole(Path(path), self.html().encode())


def png(image: Tensor) -> bytes:
    """One picture, float [C, H, W] in [-1, 1], as PNG; values outside are clamped, NaN is mid-gray."""
    buffer = io.BytesIO()
    to_pil(image.nan_to_num(nan=0.0)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(image: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def _check_images(title: str, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise UserError(
            f"'{title}' needs pictures [N, C, H, W] with 1, 3 or 4 channels, not {list(images.shape)}.",
            key=title,
            code="shape",
        )


def _check_count(title: str, what: str, given: Sequence[object] | Tensor, wanted: int, optional: bool = False) -> None:
    if len(given) != wanted and not (optional and len(given) == 0):
        raise UserError(f"'{title}' has {len(given)} {what} where it needs {wanted}.", key=title, code="shape")


def _cell_style(images: Tensor, columns: int, scale: int | None, room: int) -> str:
    """The CSS variables that size the pictures of a grid: their width, and the steps it may shrink by.

    Small pictures shrink by whole picture pixels, so that all their pixels stay of one size.
    """
    width = images.shape[-1]
    scale = scale or max(1, room // width)
    step = width if width <= 16 and width * columns <= 300 else 1
    return f"--columns:{columns};--cell:{width * scale}px;--step:{step}px"


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["number"] = value_text
    # plots.py escapes every text it takes, so its SVG may stand in the page as it is
    environment.globals["svg"] = lambda chart, width, height: Markup(plots.svg(chart, width, height))
    environment.globals["legend"] = lambda chart: [(Markup(mark), name) for mark, name in plots.legend(chart)]
    environment.globals["chart_table"] = plots.table
    environment.globals["cell_style"] = _cell_style
    return environment.get_template("report.html.jinja")
