"""`carrara evaluate --table` and `--report`: filled, interrupted, continued, shown."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carrara.evaluation.protocol import Evaluation
from carrara.evaluation.tables import ETAS, GUIDANCE, PUBLISHED, PUBLISHED_STEPS, Cell, cells, fill
from carrara.model import DiffusionModel
from carrara.process import schedules
from carrara.sampling import Samples
from carrara.solvers import named
from tests.cli.conftest import Command

Refused = Callable[..., str]


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: float | None = None) -> list[float]:
    """The guidance of everything that is sampled from now on; at `fails_at` the program is broken off."""
    made: list[float] = []
    sample = DiffusionModel.sample

    def listening(self: DiffusionModel, *args: Any, **choices: Any) -> Samples:
        if choices["guidance"] == fails_at:
            raise KeyboardInterrupt
        made.append(choices["guidance"])
        return sample(self, *args, **choices)

    monkeypatch.setattr(DiffusionModel, "sample", listening)
    return made


def test_an_interrupted_table_goes_on(
    tiny_run: Path, tmp_path: Path, carrara: Command, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the third cell, it goes on with the third; the end is that of one walk. Another protocol is
    refused."""
    words = ("sweep", tiny_run, "--reference", "digits", "--table", "guidance", "--steps", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert carrara(*words, "--n", "8", "--out", whole).returncode == 0
    with monkeypatch.context() as patch:
        made = counted(patch, fails_at=GUIDANCE[2])
        assert carrara(*words, "--n", "8", "--out", broken).returncode == 130
        assert made == list(GUIDANCE[:2])
    assert not (broken / "table.md").exists()
    with monkeypatch.context() as patch:
        made = counted(patch)
        assert carrara(*words, "--n", "8", "--out", broken).returncode == 0
        assert made == list(GUIDANCE[2:])
    for file in ("table.md", "table.csv", "table.svg", "table.html"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert "another protocol" in refused(*words, "--n", "9", "--out", broken)


def test_a_table_is_written_in_every_form(tiny_run: Path, tmp_path: Path, carrara: Command) -> None:
    words = ("sweep", tiny_run, "--reference", "digits", "--evaluator", "svc", "--n", "10", "--steps", "1")
    assert carrara(*words, "--table", "guidance", "--out", tmp_path).returncode == 0
    text = (tmp_path / "table.md").read_text()
    assert text.count("| own solver |") == 4  # distance, precision, recall, class accuracy
    assert "10 samples for 64 dimensions" in text
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {float(row["guidance scale"]) for row in rows} == set(GUIDANCE)
    assert {row["metric"] for row in rows} >= {"frechet_distance", "coverage", "class_accuracy"}
    picture = ET.parse(tmp_path / "table.svg").getroot()
    assert picture.tag.endswith("svg")
    assert "frechet_distance" in "".join(picture.itertext())
    page = (tmp_path / "table.html").read_text()
    assert page.count("data:image/png") == len(GUIDANCE)  # the samples of every cell
    assert "Song et al." not in page  # nothing was published for this table


def test_one_page_holds_everything(tiny_run: Path, tmp_path: Path, carrara: Command, refused: Refused) -> None:
    """Samples, nearest neighbours, classes, the curves of the bound, and a table that was filled before."""
    base = ("evaluate", tiny_run, "--reference", "digits", "--steps", "1")
    table, page = tmp_path / "table", tmp_path / "page.html"
    assert carrara(*base, "--n", "8", "--table", "guidance", "--out", table).returncode == 0
    words = ("--reference-split", "test", "--train", "digits", "--per-class", "--held-out", "digits")
    words += ("--held-out-n", "4", "--report", page, "--tables", table)  # type: ignore[assignment]
    done = carrara(*base, "--n", "100", *words)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for title in ("Nearest training image of 16", "Metrics of each class", "Bits of every step", "Table 'guidance'"):
        assert title in text.replace("&#39;", "'"), title
    assert "class_std (95 %" in done.stdout
    (table / "own_solver,_3.json").unlink()
    assert "lacks 1 cells, first 'own_solver,_3'" in refused(*base, "--n", "8", "--report", page, "--tables", table)
    assert "contains no table" in refused(*base, "--n", "8", "--report", page, "--tables", tmp_path)


def test_the_tables_are_those_of_the_papers(tmp_path: Path, tiny_run: Path, refused: Refused) -> None:
    schedule = schedules.linear(1000)
    ddim = cells("ddim", schedule)
    assert list(dict.fromkeys(cell.line for cell in ddim)) == ["η 0", "η 0.2", "η 0.5", "η 1", "σ̂"]
    assert [cell.choices["steps"] for cell in ddim[:5]] == [10, 20, 50, 100, 1000]
    assert all(figures.keys() == ETAS.keys() for figures in PUBLISHED.values())
    assert {len(row) for figures in PUBLISHED.values() for row in figures.values()} == {len(PUBLISHED_STEPS)}
    for cell in cells("solvers", schedule):
        named(cell.choices["solver"])
    words = ("evaluate", tiny_run, "--reference", "digits")
    assert "did you mean 'ddim'" in refused(*words, "--table", "ddm", "--out", tmp_path)
    assert "--steps" in refused(*words, "--table", "ddim", "--out", tmp_path, "--steps", "3")
    assert "out" in refused(*words, "--table", "ddim")
    assert "no run or model folder" in refused("evaluate", "digits", *words[2:], "--table", "ddim", "--out", tmp_path)


def test_the_paper_stands_beside_a_table_of_ddim(tiny_run: Path, tmp_path: Path, carrara: Command) -> None:
    """Labelled as another model and other features; cells that are there are not measured again."""
    words = ("evaluate", tiny_run, "--reference", "digits", "--n", "8", "--table", "guidance", "--steps", "1")
    assert carrara(*words, "--out", tmp_path / "g").returncode == 0
    from carrara.evaluation import page, tables

    filled = tables.read(tmp_path / "g")
    figures = filled.cells[0][1]
    plan = cells("ddim", schedules.linear(1000))
    known = tables.Table("ddim", [(cell, figures) for cell in plan], filled.protocol, tmp_path)
    text = tables.markdown(known)
    assert "FID of other models, in other features (Song et al. 2021), CIFAR-10" in text
    assert "| σ̂ | 367.43 | 133.37 | 32.72 | 9.99 | 3.17 |" in text
    assert "other models, in other features" in page.of_table(known).html()


def test_a_cell_counts_once_its_figures_are_there(tmp_path: Path) -> None:
    """A picture without figures, as a broken walk leaves it, does not stand for its cell."""

    def never(cell: Cell) -> Evaluation:
        raise KeyboardInterrupt

    plan = [Cell("a b", 1, {})]
    (tmp_path / "a_b,_1.png").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, "solvers", plan, {"features": "pixels"}, never)


@pytest.mark.parametrize("key", ["predicts", "schedule", "levels"])
def test_a_model_that_differs_in_more_than_its_weights_has_its_own_table(
    key: str, tiny_run: Path, tmp_path: Path, carrara: Command, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights that predict something else, or of another schedule, are another model."""
    monkeypatch.setattr("carrara.evaluation.tables.GUIDANCE", (1.0,))
    words = ("--reference", "digits", "--n", "8", "--table", "guidance", "--steps", "1", "--out", tmp_path / "t")
    assert carrara("sweep", tiny_run, *words).returncode == 0
    model = DiffusionModel.load(tiny_run)
    change: Any = {"predicts": "eps", "schedule": schedules.linear(1000), "levels": 256}[key]
    replace(model, **{key: change}).save(tmp_path / "other")
    assert "another protocol" in refused("sweep", tmp_path / "other", *words)
    assert carrara("sweep", tiny_run, *words, "--json").returncode == 0
