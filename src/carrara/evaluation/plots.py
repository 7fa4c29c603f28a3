"""Line charts as inline SVG in the page's own colours: no plotting library, no script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import ClassVar

from carrara.errors import UserError

PALETTE = 6  # colours in the page's style sheet: the variables --series-0 … --series-5
DRAWN = 600  # points of one line that are drawn; beyond it only the extremes of each bucket are
MARKED = 24  # a line of no more points than this shows them as marks
LISTED = 24  # rows of a chart's data table
POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a chart.

    A point that is not finite, or not positive on a logarithmic axis, is left out and breaks the line.

    Attributes:
        name: its name in the legend and in the data table.
        x: where the points lie; a line is drawn in this order.
        y: their values, as many as x.
        low: lower ends of the points' intervals, drawn as a band with `high`; None for no band.
        high: upper ends.
        faint: drawn thin and gray, as the background of other lines (a raw loss under its mean).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    faint: bool = False

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise UserError(
                f"the series '{self.name}' has one end of its intervals: give both low and high.",
                key="low",
                code="missing",
            )
        for values in (self.y, self.low, self.high):
            if values is not None and len(values) != len(self.x):
                raise UserError(
                    f"the series '{self.name}' has {len(self.x)} x for {len(values)} values.", key="x", code="shape"
                )


@dataclass(frozen=True, eq=False)
class LineChart:
    """Lines over a common x axis.

    Attributes:
        title: a few words above the chart; also what a screen reader calls it.
        series: the lines. Those that are not faint take the page's colours in their order.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        caption: one sentence on what is shown and how to read it.
        log_x: a logarithmic x axis.
        log_y: a logarithmic y axis.
        references: horizontal lines to compare with: name and value.
    """

    kind: ClassVar[str] = "line_chart"
    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    caption: str
    log_x: bool = False
    log_y: bool = False
    references: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Axis:
    """The range of one axis and its ticks, in data units."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a value lies on the axis: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` neighbours centred on each value; fewer at both ends, never padded."""
    if window < 1:
        raise UserError(f"a moving average needs a window of at least 1, not {window}.", key="window", code="invalid")
    before, after = (window - 1) // 2, window // 2
    spans = (values[max(0, i - before) : i + after + 1] for i in range(len(values)))
    return [math.fsum(span) / len(span) for span in spans]


def linear_axis(values: Sequence[float], count: int, tight: bool = False) -> Axis:
    """A linear axis over `values` with about `count` ticks at 1, 2 or 5 times a power of ten.

    It begins at zero where the values come near it; `tight` ends it at the values, not at the next ticks.
    """
    low, high = min(values), max(values)
    if not tight and 0 <= low <= 0.35 * high:
        low = 0.0
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):  # too close for a tick to tell them apart
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(k * step for k in range(first, last + 1))
    if not tight:
        return Axis(ticks[0], ticks[-1], False, ticks)
    slack = 1e-9 * (high - low)
    return Axis(low, high, False, tuple(t for t in ticks if low - slack <= t <= high + slack))


def log_axis(values: Sequence[float], tight: bool = False) -> Axis:
    """A logarithmic axis over positive `values`; ticks at powers of ten, with 2 and 5 between few of them."""
    low, high = min(values), max(values)
    if high <= low * (1 + 1e-9):
        low, high = low / 2, high * 2
    if not tight:
        margin = (high / low) ** 0.06
        low, high = low / margin, high * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = tuple(f * 10.0**d for d in decades for f in factors)
        ticks = tuple(t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9))
        if len(ticks) >= 3:
            every = -(-len(ticks) // 8)  # many decades: every second or third is named
            return Axis(low, high, True, ticks[::every])
    return Axis(low, high, True, linear_axis((low, high), 4, tight=True).ticks)


def tick_labels(axis: Axis) -> list[str]:
    """Short names of the ticks: one number of decimals on a linear axis, powers of ten far from 1."""
    largest = max(map(abs, axis.ticks), default=0.0)
    smallest = min((abs(tick) for tick in axis.ticks if abs(tick) > 1e-9 * largest), default=1.0)
    far = largest >= 1e6 or smallest < 1e-4
    if axis.log and largest >= 4 * smallest:
        return [power_text(tick) if far else f"{tick:,.6g}" for tick in axis.ticks]
    exponent = math.floor(math.log10(largest)) if far else 0
    ticks = [tick / 10.0**exponent + 0.0 for tick in axis.ticks]
    blur = 1e-6 * (ticks[-1] - ticks[0] or 1.0) if ticks else 1.0
    decimals = next((d for d in range(9) if all(abs(round(t, d) - t) <= blur for t in ticks)), 9)
    names = [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]
    power = "·10" + str(exponent).translate(POWERS) if exponent else ""
    return [name if tick == 0 else name + power for name, tick in zip(names, ticks, strict=True)]


def power_text(value: float) -> str:
    """A number as a power of ten: 2·10⁻⁵."""
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10.0**exponent:.3g}".replace("-", "−")
    power = "10" + str(exponent).translate(POWERS)
    return power if factor == "1" else f"{factor}·{power}"


@dataclass(frozen=True)
class Frame:
    """The rectangle inside the axes, in units of the picture (y grows downwards), and the axes over it."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def across(self, x: float) -> float:
        """The horizontal place of a value of x."""
        return self.left + self.x.place(x) * (self.right - self.left)

    def down(self, y: float) -> float:
        """The vertical place of a value of y."""
        return self.bottom - self.y.place(y) * (self.bottom - self.top)


def svg(chart: LineChart, width: int, height: int) -> str:
    """The chart as one `<svg>` element, `width` × `height` units large, its text 13 units high.

    Colours are CSS variables of the page (`--series-k`, `--ink`, `--muted`, `--hairline`, `--faint`), so the
    chart follows its light and dark mode. Every text of the chart is escaped.
    """
    frame = _frame(chart, width, height)
    if frame is None:
        place = f'x="{width / 2}" y="{height / 2}" text-anchor="middle"'
        body = f"<text {place}>There is no finite value to draw.</text>"
    else:
        lines = sorted(zip(chart.series, colours(chart), strict=True), key=lambda pair: not pair[0].faint)
        body = _scales(chart, frame, height)
        body += "".join(_line(chart, frame, series, colour) for series, colour in lines)
        body += _references(chart, frame)
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">'
    return f"{opening}{body}</svg>"


LIGHT = ("#1d5f68", "#b8602a", "#6a5aa6", "#8a7414", "#a23b63", "#4d7fb8")
"""The page's colours of lines on white."""

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #5c6269 } .name { fill: #22262a }
.grid { stroke: #dedad3 } .base { stroke: #5c6269; fill: none } .faint { --colour: #b9b5ae }
.reference { fill: none; stroke: #22262a; stroke-dasharray: 1 4 }
.line { fill: none; stroke: var(--colour); stroke-width: 2 } .band { fill: var(--colour); opacity: .16 }
.mark { fill: var(--colour); stroke: #fff }
"""


def standalone(chart: LineChart, width: int, height: int) -> str:
    """The chart as an SVG file of its own, on white, its legend under the axis."""
    names = legend(chart)
    style = _STYLE + " ".join(f".s{k} {{ --colour: {colour} }}" for k, colour in enumerate(LIGHT))
    across = width / max(1, len(names))
    drawn = svg(chart, width, height).replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    names_below = ""
    for k, (mark, name) in enumerate(names):
        placed = mark.replace("<svg ", f'<svg x="{k * across + 8:.0f}" y="{height + 6}" width="26" height="12" ', 1)
        names_below += f'{placed}<text x="{k * across + 40:.0f}" y="{height + 17}">{escape(name)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 30}" width="{width}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{drawn}{names_below}</svg>\n'
    )


def colours(chart: LineChart) -> list[str]:
    """The style class of each series: `faint`, or `s0`, `s1`, … in order."""
    count = 0
    names = []
    for series in chart.series:
        names.append("faint" if series.faint else f"s{count % PALETTE}")
        count += not series.faint
    return names


def legend(chart: LineChart) -> list[tuple[str, str]]:
    """What the legend shows: a small line as `<svg>`, and the name of a series or reference (not escaped)."""
    entries = []
    for series, colour in zip(chart.series, colours(chart), strict=True):
        mark = _mark(colour, 13, 6) if _marked(series) else ""
        opening = f'<svg class="swatch {colour}" viewBox="0 0 26 12" aria-hidden="true">'
        entries.append((f'{opening}<path class="line" d="M1 6H25"/>{mark}</svg>', series.name))
    dotted = '<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true"><path class="reference" d="M1 6H25"/></svg>'
    return entries + [(dotted, f"{name}: {value_text(value)}") for name, value in chart.references]


def table(chart: LineChart) -> list[tuple[float, list[float | None]]]:
    """Rows (x, the value of each series there or None) of the chart's data table, at most `LISTED`.

    Where there are more, every k-th x of those that most series share.
    """
    values = [dict(zip(series.x, series.y, strict=True)) for series in chart.series]
    shared = Counter(x for series in values for x in series if math.isfinite(x))
    places = sorted(shared)
    if len(places) > LISTED:
        most = max(shared.values())
        common = [x for x in places if shared[x] == most]
        places = common if len(common) >= LISTED else places
        last = len(places) - 1
        places = [places[round(k * last / (LISTED - 1))] for k in range(LISTED)]
    return [(x, [series.get(x) for series in values]) for x in places]


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _frame(chart: LineChart, width: int, height: int) -> Frame | None:
    """The axes around every drawable point, or None where there is none."""
    xs: list[float] = []
    ys = [value for _, value in chart.references if _drawable(value, chart.log_y)]
    for series in chart.series:
        for run in _runs(chart, series):
            xs += [x for x, _ in run]
            ys += [y for _, y in run]
        ys += [y for y in (*(series.low or ()), *(series.high or ())) if _drawable(y, chart.log_y)]
    if not xs:
        return None
    y_axis = log_axis(ys) if chart.log_y else linear_axis(ys, 5)
    left = 14 + 7.2 * max(map(len, tick_labels(y_axis)))
    x_axis = log_axis(xs, tight=True) if chart.log_x else linear_axis(xs, width // 100, tight=True)
    frame = Frame(x_axis, y_axis, left, width - 22.0, 30.0, height - 50.0)
    places = sorted(set(xs))
    if 2 <= len(places) <= 8:  # few places (numbers of steps): name them instead of round numbers
        named = places[:1]
        for x in places[1:]:
            if frame.across(x) - frame.across(named[-1]) >= 30:
                named.append(x)
        frame = replace(frame, x=replace(x_axis, ticks=tuple(named)))
    return frame


def _scales(chart: LineChart, frame: Frame, height: int) -> str:
    """Grid lines, tick labels and the names of the axes."""
    left, right, bottom = f"{frame.left:.1f}", f"{frame.right:.1f}", f"{frame.bottom:.1f}"
    parts = [f'<text class="name" x="0" y="14">{escape(chart.y_label)}</text>']
    for tick, name in zip(frame.y.ticks, tick_labels(frame.y), strict=True):
        y = frame.down(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{frame.left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    parts.append(f'<path class="base" d="M{left} {bottom}H{right}"/>')
    for tick, name in zip(frame.x.ticks, tick_labels(frame.x), strict=True):
        x = f"{frame.across(tick):.1f}"
        parts.append(f'<path class="base" d="M{x} {bottom}v5"/>')
        parts.append(f'<text x="{x}" y="{frame.bottom + 20:.1f}" text-anchor="middle">{name}</text>')
    middle = f"{(frame.left + frame.right) / 2:.1f}"
    label = escape(chart.x_label)
    parts.append(f'<text class="name" x="{middle}" y="{height - 6}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _references(chart: LineChart, frame: Frame) -> str:
    """The horizontal lines to compare with; the legend names them, where no line can cross their names."""
    heights = [frame.down(value) for _, value in chart.references if _drawable(value, chart.log_y)]
    return "".join(f'<path class="reference" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>' for y in heights)


def _line(chart: LineChart, frame: Frame, series: Series, colour: str) -> str:
    """The band, the line and the marks of one series."""
    parts = [f'<g class="{colour}">', _band(chart, frame, series)]
    for run in _runs(chart, series):
        points = [f"{frame.across(x):.1f} {frame.down(y):.1f}" for x, y in thinned(run, DRAWN)]
        if len(points) > 1:
            parts.append(f'<path class="line" d="M{"L".join(points)}"/>')
        if _marked(series) or len(points) == 1:
            for x, y in run:
                title = f"{series.name}: {value_text(y)} at {value_text(x)}"
                parts.append(_mark(colour, frame.across(x), frame.down(y), title))
    return "".join([*parts, "</g>"])


def _band(chart: LineChart, frame: Frame, series: Series) -> str:
    """The intervals of a series as one closed area."""
    if series.low is None or series.high is None:
        return ""
    ends = [
        (frame.across(x), frame.down(low), frame.down(high))
        for x, low, high in zip(series.x, series.low, series.high, strict=True)
        if _drawable(x, chart.log_x) and _drawable(low, chart.log_y) and _drawable(high, chart.log_y)
    ]
    if not ends:
        return ""
    ends = ends[:: -(-len(ends) // DRAWN)]
    upper = [f"{x:.1f} {high:.1f}" for x, _, high in ends]
    lower = [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(ends)]
    return f'<path class="band" d="M{"L".join(upper + lower)}Z"/>'


def _runs(chart: LineChart, series: Series) -> list[list[tuple[float, float]]]:
    """The drawable points of a series, broken where one is not."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if _drawable(x, chart.log_x) and _drawable(y, chart.log_y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def thinned(run: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the points: the lowest and the highest of each bucket, so that no peak is lost."""
    if len(run) <= most:
        return list(run)
    size = -(-len(run) // (most // 2))
    kept = []
    for start in range(0, len(run), size):
        bucket = range(start, min(start + size, len(run)))
        lowest, highest = min(bucket, key=lambda k: run[k][1]), max(bucket, key=lambda k: run[k][1])
        kept += [run[k] for k in sorted({lowest, highest})]
    return kept


def _marked(series: Series) -> bool:
    return not series.faint and len(series.x) <= MARKED


def _mark(colour: str, x: float, y: float, title: str = "") -> str:
    """A mark around a point; its shape distinguishes the series where its colour cannot."""
    start = f"M{x:.1f} {y:.1f}"
    shapes = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
        "m-3.5-3.5h7v7h-7z",
        "m0-5l5 5l-5 5l-5-5z",
        "m0-5l4.8 8.5h-9.6z",
        "m0 5l4.8-8.5h-9.6z",
        "m-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    )
    shape = shapes[int(colour[1:])] if colour != "faint" else shapes[0]
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="mark" d="{start}{shape}">{inside}</path>'


def value_text(value: float | None) -> str:
    """A number for a reader: four significant digits, a true minus sign, a dash for None."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return power_text(value)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")
