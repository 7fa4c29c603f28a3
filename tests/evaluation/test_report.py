"""The report: self-contained, escaped, deterministic, readable in both widths and both colour schemes."""

from __future__ import annotations

import base64
import errno
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from carrara.evaluation import plots, report
from carrara.evaluation.report import (
    Block,
    Code,
    FilmStrip,
    Headlines,
    ImageGrid,
    KeyValues,
    LineChart,
    MetricRow,
    MetricTable,
    Pairs,
    Report,
    Section,
    Series,
    SideBySide,
    Table,
    Text,
)
from tests.browser import Tree, browse
from tests.errors import refused

finite = st.floats(-1e8, 1e8).filter(lambda x: x == 0 or abs(x) > 1e-8)


def pictures(n: int, channels: int = 1, size: int = 8) -> Tensor:
    """Random pictures [n, channels, size, size] in [-1, 1]."""
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(n)) * 2 - 1


def blocks(word: str) -> list[Block]:
    """One block of each kind, with `word` in every text it takes."""
    figures = [
        MetricRow(word, 99.4, word, 1, (98.7, 99.8), at_least=99, protocol=word, comment=word),
        MetricRow(word, 0.45, at_most=0.4),
        MetricRow(word, math.nan, at_most=1),
        MetricRow(word, 12),
    ]
    classes = [f"{k} {word}" for k in range(10)]
    lines = [
        Series(word, range(1, 2001), [1 / k for k in range(1, 2001)], faint=True),
        Series(word, [5, 10, 20, 50], [3.0, math.nan, 0.5, 0.25], [2.5, 1, 0.4, 0.2], [3.5, 2, 0.6, 0.3]),
    ]
    chart = LineChart(word, lines, word, word, word, log_x=True, log_y=True, references=[(word, 0.41)])
    return [
        Text(f"{word}\n\n{word}"),
        Headlines(figures),
        SideBySide(
            [
                ImageGrid(word, pictures(100), 10, word, [str(k) for k in range(10)]),
                ImageGrid(word, pictures(20, 3, 32), 10, word, classes, [word, word], [word] * 20),
            ]
        ),
        ImageGrid(word, pictures(3, 4, 80), 2, word),
        Pairs(word, pictures(16), pictures(16), word, word, [word] * 16, word),
        FilmStrip(word, 3 * pictures(11), pictures(11), [1000.0, *range(900, -1, -100)], word),
        chart,
        LineChart(word, [Series(word, [1, 2], [math.nan, math.inf])], word, word, word),
        MetricTable(figures),
        Table(word, [word, *classes], [[word, *map(float, range(10))], [word, None, *classes[1:]]], word),
        Code(word, f"path: {word}\n  " + "long " * 60),
        KeyValues(word, {word: 1.5, "hash": "0123456789abcdef" * 6}),
    ]


def page(word: str) -> str:
    """A report with every kind of block."""
    sections = [Section(f"{word} {k}", [block], word) for k, block in enumerate(blocks(word))]
    return Report(word, word, sections).html()


PAGE = page("word")
ROOT = Tree(PAGE).root


def test_page_refers_to_nothing_outside_itself() -> None:
    for element in ROOT.all():
        assert element.tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            value = element.attributes.get(name, "#")
            assert value.startswith(("#", "data:")), value[:60]
        assert not [name for name in element.attributes if name.startswith("on")]
    styles = " ".join(element.text for element in ROOT.all("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = [e.attributes["content"] for e in ROOT.all("meta") if "http-equiv" in e.attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_equal_input_gives_equal_bytes() -> None:
    assert page("word") == PAGE


@pytest.mark.parametrize("word", ['<b onclick="f()">&amp;\'</b>', "</style></svg><img src=x>", "{{ report }}"])
def test_every_text_is_escaped(word: str) -> None:
    """A page of nasty words has the same elements as one of harmless words, and shows the nasty ones."""
    nasty = Tree(page(word)).root
    assert [e.tag for e in nasty.all()] == [e.tag for e in ROOT.all()]
    assert [list(e.attributes) for e in nasty.all()] == [list(e.attributes) for e in ROOT.all()]
    assert nasty.words().count(word) == ROOT.words().count("word")


def test_everything_has_a_name() -> None:
    assert all(image.attributes["alt"] for image in ROOT.all("img"))
    assert all(e.attributes.get("aria-label") or "aria-hidden" in e.attributes for e in ROOT.all("svg"))
    assert all("scope" in header.attributes for header in ROOT.all("th"))
    assert all(len(figure.all("figcaption")) == 1 for figure in ROOT.all("figure"))
    names = [e.attributes["id"] for e in ROOT.all() if "id" in e.attributes]
    assert len(names) == len(set(names))
    assert {a.attributes["href"] for a in ROOT.all("a")} <= {f"#{name}" for name in names}


def test_pictures_are_rounded_and_clamped() -> None:
    """-1, 0 and 1 are 0, 128 (127.5 rounds to even) and 255; beyond is clamped; NaN is mid-gray."""
    values = torch.tensor([-1.0, 0.0, 1.0, -3.0, 3.0, math.nan]).reshape(1, 2, 3)
    shown = Image.open(io.BytesIO(report.png(values)))
    assert (shown.mode, shown.size) == ("L", (3, 2))
    assert list(shown.tobytes()) == [0, 128, 255, 0, 255, 128]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_arrive_in_order(channels: int, mode: str) -> None:
    images = pictures(6, channels)
    grid = Report("t", "s", [Section("s", [ImageGrid("g", images, 3, "c")])]).html()
    sources = [e.attributes["src"] for e in Tree(grid).root.all("img")]
    for source, image in zip(sources, images, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert shown.mode == mode
        expected = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        assert shown.tobytes() == expected.numpy().tobytes()


def test_nearly_equal_values_have_an_axis() -> None:
    """Values that differ by less than a tick can tell are one value."""
    for value in (0.0, 1e8, -3.0, 1e-5):
        axis = plots.linear_axis([value, math.nextafter(value, math.inf)], 5)
        assert axis.high - axis.low >= abs(value)
        assert len(set(plots.tick_labels(axis))) == len(axis.ticks) >= 2


@given(value=finite, target=finite, decimals=st.integers(0, 4), upper=st.booleans())
def test_printed_value_never_hides_a_miss(value: float, target: float, decimals: int, upper: bool) -> None:
    figure = MetricRow("f", value, "", decimals, None, None if upper else target, target if upper else None)
    assert figure.reached == (value <= target if upper else value >= target)
    if not figure.reached:
        printed = float(figure.value_text.replace("−", "-").replace(",", ""))
        assert printed > target if upper else printed < target


def test_figure_says_what_it_must_reach() -> None:
    assert MetricRow("f", 1.0).reached is None
    assert MetricRow("f", math.nan, at_most=1).reached is False
    assert MetricRow("f", 98.96, "%", 1, at_least=99).value_text == "98.96"
    assert MetricRow("f", 1, "%", at_least=0.5, at_most=2).target_text == "≥\u00a00.5 and ≤\u00a02\u00a0%"
    assert MetricRow("f", -1.25, interval=(-2, 1000)).interval_text == "−2.00 to 1,000.00"


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_linear_axis_covers_its_values(values: list[float], tight: bool) -> None:
    axis = plots.linear_axis(values, 5, tight)
    width = axis.high - axis.low
    assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)  # ticks are products, exact to rounding
    assert all(-1e-6 <= axis.place(t) <= 1 + 1e-6 for t in axis.ticks)
    assert all(a < b for a, b in zip(axis.ticks, axis.ticks[1:], strict=False))
    assert len(axis.ticks) <= 8
    labels = plots.tick_labels(axis)
    if width > 1e-6 * max(map(abs, axis.ticks), default=0):
        assert len(set(labels)) == len(axis.ticks), labels


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20), st.booleans())
def test_log_axis_covers_its_values(values: list[float], tight: bool) -> None:
    axis = plots.log_axis(values, tight)
    assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v in values)
    assert all(-1e-6 <= axis.place(t) <= 1 + 1e-6 for t in axis.ticks)
    assert len(axis.ticks) <= 8
    assert len(set(plots.tick_labels(axis))) == len(axis.ticks)


@pytest.mark.parametrize(
    ("ticks", "log", "labels"),
    [
        ((0.0, 0.5, 1.0), False, ["0.0", "0.5", "1.0"]),
        ((-1000.0, 0.0, 1000.0), False, ["−1,000", "0", "1,000"]),
        ((0.0, 1e-5, 2e-5), False, ["0", "1·10⁻⁵", "2·10⁻⁵"]),
        ((1e-5, 1e-3, 0.1), True, ["10⁻⁵", "10⁻³", "10⁻¹"]),
        ((5.0, 10.0, 20.0, 50.0), True, ["5", "10", "20", "50"]),
    ],
)
def test_tick_labels_are_short(ticks: tuple[float, ...], log: bool, labels: list[str]) -> None:
    assert plots.tick_labels(plots.Axis(ticks[0], ticks[-1], log, ticks)) == labels


def test_chart_draws_each_point_where_it_belongs() -> None:
    """On a logarithmic axis 1, 10, 100 lie at equal distances; a NaN breaks the line in two."""
    y = [1.0, 10.0, 100.0]
    drawn = plots.svg(LineChart("t", [Series("s", [1, 10, 100], y)], "x", "y", "c", True, True), 400, 300)
    (path,) = re.findall(r'class="line" d="M([^"]*)"', drawn)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split()) for point in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # coordinates are rounded to 0.1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2
    broken = plots.svg(LineChart("t", [Series("s", range(5), [1, 2, math.nan, 2, 1])], "x", "y", "c"), 400, 300)
    assert broken.count('class="line"') == 2
    assert "nan" not in broken


def test_chart_without_a_drawable_point_says_so() -> None:
    for y, log in (([math.nan, math.inf], False), ([0.0, -1.0], True)):
        chart = LineChart("t", [Series("s", [1, 2], y)], "x", "y", "c", log_y=log)
        assert "no finite value" in plots.svg(chart, 400, 300)


def test_chart_table_lists_the_numbers() -> None:
    short = LineChart("t", [Series("a", [1, 2], [5, 6]), Series("b", [2, 3], [7, 8])], "x", "y", "c")
    assert plots.table(short) == [(1, [5, None]), (2, [6, 7]), (3, [None, 8])]
    long = LineChart(
        "t", [Series("a", range(1000), range(1000)), Series("b", range(0, 1000, 10), range(100))], "x", "y", "c"
    )
    rows = plots.table(long)
    assert len(rows) == plots.LISTED
    assert (rows[0], rows[-1]) == ((0, [0, 0]), (990, [990, 99]))
    assert all(None not in values for _, values in rows)


@given(st.lists(st.floats(-10, 10), max_size=300), st.integers(4, 50))
def test_thinning_keeps_the_peaks(values: list[float], most: int) -> None:
    run = list(enumerate(values))
    kept = plots.thinned([(float(x), y) for x, y in run], most)
    assert len(kept) <= most or len(kept) == len(run) <= most
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    if values:
        assert (min(y for _, y in kept), max(y for _, y in kept)) == (min(values), max(values))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 50))
def test_moving_average_is_a_mean_of_neighbours(values: list[float], window: int) -> None:
    smooth = plots.moving_average(values, window)
    assert len(smooth) == len(values)
    assert plots.moving_average(values, 1) == values
    for k, mean in enumerate(smooth):
        near = [v for j, v in enumerate(values) if -((window - 1) // 2) <= j - k <= window // 2]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-12)


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (6, [6]), (7, [4, 3]), (12, [6, 6])])
def test_long_film_is_cut_in_two(count: int, rows: list[int]) -> None:
    film = FilmStrip("film", pictures(count), pictures(count), range(count), "c")
    assert [len(half) for half in film.halves] == rows
    assert [k for half in film.halves for k in half] == list(range(count))


def test_mistakes_are_named() -> None:
    with refused("shape", "grid"):
        ImageGrid("grid", torch.zeros(2, 2, 8, 8), 2, "c")
    with refused("shape", "grid"):
        ImageGrid("grid", pictures(2), 2, "c", ["a", "b", "c"])
    with refused("shape", "near"):
        Pairs("near", pictures(2), pictures(2), "a", "b", ["1"], "c")
    with refused("shape", "film"):
        FilmStrip("film", pictures(3), pictures(3), [1, 0], "c")
    with refused("shape", "x"):
        Series("a", [1, 2], [1])
    with refused("missing", "low"):
        Series("a", [1], [1], low=[0])
    with refused("shape"):
        Table("t", ["a", "b"], [["x"]], "c")
    with refused("invalid", "window"):
        plots.moving_average([1.0], 0)


def test_full_disk_leaves_the_previous_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    Report("first", "", []).write(path)
    before = path.read_bytes()
    assert b"first" in before

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with refused("resources"):
        Report("second", "", []).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def colours(block: str) -> dict[str, str]:
    """The colour variables of one rule of the style sheet."""
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2.1 between two colours "#rrggbb"."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out(scheme: int) -> None:
    """WCAG 2.1 AA: 4.5 for text, 3 for what must be seen in a chart."""
    rules = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)
    assert len(rules) == 2
    palette = colours(rules[scheme])
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name in ("ink", "muted", "accent", "missed"):
        assert contrast(palette[name], palette["paper"]) >= 4.5, name
    assert contrast(palette["ink"], palette["surface"]) >= 4.5
    for k in range(plots.PALETTE):
        assert contrast(palette[f"series-{k}"], palette["paper"]) >= 3, k


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_a_phone_and_a_desktop(width: int, scheme: str, tmp_path: Path) -> None:
    measured, complaints, shot = browse(PAGE, width, scheme, tmp_path)
    assert measured["inner"] == width
    assert measured["overflow"] == 0
    assert complaints == []
    assert measured["dark"] == (scheme == "dark")
    assert measured["pictures"] == len(ROOT.all("img"))
    assert isinstance(measured["digit"], int | float)
    assert measured["digit"] >= 24
    assert measured["digit"] % 8 == 0, "a digit's pixels are not all of one size"
    rule = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)[scheme == "dark"]
    paper = tuple(bytes.fromhex(colours(rule)["paper"][1:]))
    assert measured["paper"] == f"rgb{paper}"
    assert shot.getpixel((2, 2)) == paper
    assert len(np.unique(np.asarray(shot).reshape(-1, 3), axis=0)) > 200  # text, pictures and lines are there


@pytest.mark.browser
def test_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    """The check above would notice an overflow and an error."""
    bad = '<!DOCTYPE html><body style="margin:0"><div style="width:1000px">wide</div>'
    bad += '<script>console.error("wrong")</script>'
    measured, complaints, _ = browse(bad, 390, "light", tmp_path)
    assert measured["overflow"] == 610
    assert len(complaints) == 1
