"""One process or two: the same figures, bit for bit, and files only where they were asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara import distributed
from carrara.cli import main
from carrara.errors import UserError
from carrara.evaluation import Pictures
from carrara.evaluation.collect import Collected, collect_together
from carrara.evaluation.features import Pixels
from tests.processes import together


def command(*words: str) -> int:
    """`carrara …` in one of the processes; its exit code."""
    sys.argv = ["carrara", *words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def words_for(run: Path, out: Path) -> tuple[str, ...]:
    """Samples in four batches, a reference in two, held-out images in two: no number of them is even."""
    sampled = ("--n", "50", "--steps", "2", "--batch-size", "16", "--judge", "svc", "--per-class")
    real = ("--reference", "digits", "--reference-split", "test", "--train", "digits")
    return ("evaluate", str(run), *real, *sampled, "--held-out", "digits", "--held-out-n", "23", "--out", str(out))


def test_two_processes_measure_what_one_does(tiny_run: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    before = sorted(tiny_run.rglob("*"))
    assert together(1, command, *words_for(tiny_run, one)) == [0]
    assert together(2, command, *words_for(tiny_run, two)) == [0, 0]
    assert one.read_bytes() == two.read_bytes()
    figures = json.loads(one.read_text())
    assert {"frechet_distance", "memorised_fraction", "bits_per_dimension", "class_accuracy[3]"} <= figures.keys()
    assert figures["frechet_distance"]["stamp"]["sampling"]["classes"] == "in the reference's proportions"
    assert sorted(tiny_run.rglob("*")) == before
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_two_processes_fill_one_table(tiny_run: Path, tmp_path: Path) -> None:
    words = ("evaluate", str(tiny_run), "--reference", "digits", "--n", "12", "--steps", "1", "--batch-size", "5")
    for world in (1, 2):
        out = str(tmp_path / str(world))
        assert together(world, command, *words, "--table", "guidance", "--out", out) == [0] * world
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes(), file.name


def test_a_mistake_that_one_process_meets_ends_all(tiny_run: Path, tmp_path: Path) -> None:
    """The fourth batch, which the second process reads, is cut: both say so, and none is left waiting."""
    from tests.cli.conftest import photographs

    folder = photographs(tmp_path / "photos", 300)
    (folder / "290.png").write_bytes(b"cut")
    words = ("evaluate", str(folder), "--reference", str(folder))
    assert together(2, command, *words) == [2, 2]


def numbered(count: int, batch: int) -> Pictures:
    """Pictures [3, 4] of which each is told from all others."""

    def make(rows: range) -> torch.Tensor:
        values = torch.arange(12).reshape(1, 1, 3, 4) + 12 * torch.tensor(list(rows)).reshape(-1, 1, 1, 1)
        return (values % 251) / 125 - 1

    return Pictures("numbered", count, make, batch)


def seen(count: int, batch: int, rows: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one of the processes gathers."""
    distributed.start()
    found: Collected = collect_together(numbered(count, batch), Pixels(), rows)
    return found.content, found.statistics.covariance, found.rows, found.first


@pytest.mark.parametrize("count", [1030, 7])
def test_all_processes_gather_the_same(count: int) -> None:
    """More processes than batches, too; more pictures than one block of sums."""
    expected = together(1, seen, count, 100, 1010)[0]
    for content, covariance, rows, first in together(3, seen, count, 100, 1010):
        assert content == expected[0]
        for ours, theirs in zip((covariance, rows, first), expected[1:], strict=True):
            assert torch.equal(ours, theirs)


def order(count: int) -> list[int]:
    distributed.start()
    return list(distributed.in_turn(range(count), lambda item: item * item))


def stopped(at: int) -> str:
    distributed.start()

    def work(item: int) -> int:
        if item == at:
            raise UserError(f"item {item} is bad.")
        return item

    items: Iterator[Any] = distributed.in_turn(range(10), work)
    try:
        list(items)
    except UserError as error:
        return str(error)
    return "no error"


def test_items_are_worked_on_in_turn() -> None:
    assert together(2, order, 7) == [[k * k for k in range(7)]] * 2
    assert together(2, stopped, 5) == ["item 5 is bad."] * 2
