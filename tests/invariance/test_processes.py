"""One process or two, weights whole or sharded, batches in one piece or in several: the same run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carrara.errors import UserError
from carrara.training import Trainer, checkpoint
from carrara.training.progress import Outcome
from carrara.training.step import dropout_seed
from tests.processes import killed_when, together
from tests.runs import tiny_recipe, train
from tests.training.test_loop import assert_same_bits

SHORT = (
    "training.steps=6",
    "training.checkpoint_every=3",
    "training.sample_every=6",
    "training.log_every=2",
    "training.tracker=none",
)


@dataclass
class Walk:
    """What was seen of a run: each step's positions, images, noise levels and losses, and the notices."""

    positions: list[Tensor]
    images: list[Tensor]
    outcomes: list[Outcome]
    notices: list[str]


def walk(folder: Path, assignments: tuple[str, ...], stop_at: int | None = None) -> Walk:
    """Train; with `stop_at`, leave without saving after that step, as a killed run would."""
    trainer = Trainer(tiny_recipe(*SHORT, *assignments), folder)
    seen = Walk([], [], [], [])
    honest = trainer.stepper.step

    def step(examples: Any, positions: Tensor, number: int) -> list[Outcome]:
        outcomes = honest(examples, positions, number)
        seen.positions.append(positions)
        seen.images.append(examples.x0)
        seen.outcomes.append(outcomes[0])
        return outcomes

    monkey = pytest.MonkeyPatch()
    monkey.setattr(trainer.stepper, "step", step)
    steps = trainer.steps()
    for progress in steps:
        if progress.notice:
            seen.notices.append(progress.notice)
        elif progress.step == stop_at:
            break
    steps.close()  # type: ignore[attr-defined]
    return seen


def walks(plans: list[tuple[Path, tuple[str, ...], int | None]]) -> list[Walk]:
    """Several runs, one after the other, in one group."""
    return [walk(*plan) for plan in plans]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path, name: str = "network") -> dict[str, Tensor]:
    """Of the checkpoint of step 6, whichever layout it has."""
    return checkpoint.load(folder / "checkpoints", 6)[0][name]


def assert_nearly_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Weights that differ by the rounding of sums only.

    A bias before a group norm of one channel a group has no gradient but rounding, which Adam blows up to whole
    steps: one weight in a hundred may lie anywhere within what six steps of 2e-3 can reach.
    """
    assert mine.keys() == theirs.keys()
    gap = torch.cat([(mine[key] - theirs[key]).abs().flatten() for key in mine])
    assert float(gap.max()) <= 2 * 6 * 2e-3
    assert float((gap > 2e-5).double().mean()) < 0.01


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Walk]]]:
    """By processes (1, then 2 as DDP, 2 as FSDP, 2 broken off after step 4 and taken up again)."""
    folder = tmp_path_factory.mktemp("processes")
    alone = walk(folder / "alone", ())
    plans: list[tuple[Path, tuple[str, ...], int | None]] = [
        (folder / "ddp", (), None),
        (folder / "fsdp", ("training.parallel=fsdp",), None),
        (folder / "ddp-broken", (), 4),
        (folder / "ddp-broken", (), None),
        (folder / "fsdp-broken", ("training.parallel=fsdp", "training.micro_batch=5", "network.dropout=0.2"), 4),
        (folder / "fsdp-broken", ("training.parallel=fsdp", "training.micro_batch=5", "network.dropout=0.2"), None),
        (folder / "fsdp-whole", ("training.parallel=fsdp", "training.micro_batch=5", "network.dropout=0.2"), None),
    ]
    return folder, [[alone], *zip(*together(2, walks, plans), strict=True)]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [1, 2], ids=["ddp", "fsdp"])
def test_samples_times_and_noise_are_the_same_and_losses_to_rounding(
    runs: tuple[Path, list[list[Walk]]], kind: int
) -> None:
    _, by_kind = runs
    alone, (one, two) = by_kind[0][0], by_kind[kind]
    for step in range(6):
        assert torch.equal(torch.cat([one.positions[step], two.positions[step]]), alone.positions[step])
        assert torch.equal(torch.cat([one.images[step], two.images[step]]), alone.images[step])
        for outcome in (one.outcomes[step], two.outcomes[step]):
            assert torch.equal(outcome.times, alone.outcomes[step].times)
            assert torch.equal(outcome.quarter, alone.outcomes[step].quarter)
            # float32 sums in another order, for six steps: a few units in the last place, grown by the updates
            torch.testing.assert_close(outcome.per_sample, alone.outcomes[step].per_sample, rtol=1e-4, atol=0)
            torch.testing.assert_close(outcome.gradient, alone.outcomes[step].gradient, rtol=1e-4, atol=0)


def test_the_first_step_has_the_very_same_losses(runs: tuple[Path, list[list[Walk]]]) -> None:
    """Before any sum over a batch has touched the weights: only another batch size in the kernels is left."""
    _, by_kind = runs
    torch.testing.assert_close(
        by_kind[1][0].outcomes[0].per_sample, by_kind[0][0].outcomes[0].per_sample, rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_logs_previews_and_models_agree(runs: tuple[Path, list[list[Walk]]], kind: str) -> None:
    folder, _ = runs
    for mine, theirs in zip(log_of(folder / kind), log_of(folder / "alone"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["loss_by_quarter"] == pytest.approx(theirs["loss_by_quarter"], rel=1e-4)
    assert sorted(p.name for p in (folder / kind / "samples").iterdir()) == [
        "step-00000006-ema.png",
        "step-00000006-raw.png",
    ]
    assert_nearly_same(*(load_file(folder / name / "model" / "network.safetensors") for name in (kind, "alone")))


def test_two_processes_resume_to_the_same_bits(runs: tuple[Path, list[list[Walk]]]) -> None:
    folder, by_kind = runs
    assert_same_bits(folder / "ddp", folder / "ddp-broken", 6)
    assert_same_bits(folder / "fsdp-whole", folder / "fsdp-broken", 6)
    assert by_kind[4][0].notices == ["resuming from the checkpoint of step 3."]
    assert len(by_kind[4][0].outcomes) == 3


def announced(folder: Path) -> None:
    """Train, leaving a file when step 5 is done and the checkpoint of step 3 is written."""
    trainer = Trainer(tiny_recipe(*SHORT), folder)
    for progress in trainer.steps():
        if progress.step == 5:
            trainer.writer.wait()
            (folder / f"reached-{os.environ['RANK']}").touch()


def test_two_killed_processes_resume_to_the_same_bits(runs: tuple[Path, list[list[Walk]]], tmp_path: Path) -> None:
    """SIGKILL for both at once, as when a machine goes down, then the same command again."""

    def reached() -> bool:
        return all((tmp_path / "run" / f"reached-{rank}").exists() for rank in range(2))

    killed_when(reached, 2, announced, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    for file in (tmp_path / "run").glob("reached-*"):
        file.unlink()
    notices = [seen[0].notices for seen in together(2, walks, [(tmp_path / "run", (), None)])]
    assert notices[0] == ["resuming from the checkpoint of step 3."]
    assert_same_bits(runs[0] / "ddp", tmp_path / "run", 6)


def test_network_dropout_differs_between_the_processes() -> None:
    """The same masks on all would silently divide the diversity of the batch."""
    seeds = {dropout_seed(0, step, rank) for step in range(1000) for rank in range(64)}
    assert len(seeds) == 64_000


def test_checkpoints_of_one_kind_load_in_the_others(runs: tuple[Path, list[list[Walk]]], tmp_path: Path) -> None:
    """Every kind goes on from the checkpoint of step 3 of every other, to the weights that one process reaches."""
    import shutil

    folder, _ = runs

    def broken_off(kind: str, target: str) -> Path:
        copy = Path(shutil.copytree(folder / kind, tmp_path / f"{kind}-{target}"))
        shutil.rmtree(copy / "checkpoints" / "step-00000006")
        return copy

    there: list[tuple[Path, tuple[str, ...], int | None]] = [
        (broken_off("alone", "ddp"), (), None),
        (broken_off("alone", "fsdp"), ("training.parallel=fsdp",), None),
        (broken_off("fsdp", "ddp"), (), None),
        (broken_off("ddp", "fsdp"), ("training.parallel=fsdp",), None),
    ]
    notices = [seen.notices for seen in together(2, walks, there)[0]]
    assert any("made with processes 1, this is 2" in notice for notice in notices[0])
    assert any("made with parallel fsdp, this is ddp" in notice for notice in notices[2])
    for kind in ("ddp", "fsdp"):
        walk(broken_off(kind, "alone"), ())
    for copy in (*(plan[0] for plan in there), tmp_path / "ddp-alone", tmp_path / "fsdp-alone"):
        assert_nearly_same(weights_of(copy), weights_of(folder / "alone"))


def shared_out(folder: Path) -> tuple[list[range], int]:
    """Train two steps that hardly move, with previews and validation; which rows and how many images were ours."""
    recipe = tiny_recipe(
        *SHORT,
        "training.steps=2",
        "training.learning_rate=1e-12",
        "training.validate_every=2",
        "training.validation_images=64",
        "sampling.count=5",
    )
    trainer = Trainer(recipe, folder)
    rows, images = list[range](), 0
    preview, at = trainer.task.preview, trainer.held_out.at if trainer.held_out else None

    def own_rows(module: Any, given: range) -> Any:
        rows.append(given)
        return preview(module, given)

    def own_images(step: int) -> Any:
        nonlocal images
        assert at is not None
        batch = at(step)
        images += len(batch)
        return batch

    monkey = pytest.MonkeyPatch()
    monkey.setattr(trainer.task, "preview", own_rows)
    monkey.setattr(trainer.held_out, "at", own_images)
    list(trainer.steps())
    return rows, images


def test_previews_and_validation_are_shared_out_and_come_to_the_same(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    assert shared_out(tmp_path / "one") == ([range(5)] * 2, 64)  # from the mean and from the raw weights
    told = together(2, shared_out, tmp_path / "two")
    assert told == [([range(3)] * 2, 32), ([range(3, 6)] * 2, 32)], "each makes its share; the sixth is cut off"
    one, two = (log_of(tmp_path / name)[-1]["validation"] for name in ("one", "two"))
    assert two["images"] == one["images"] == 64
    for key in ("loss", "loss_by_quarter"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)  # float32, other batch sizes in the kernels
    for kind in ("ema", "raw"):
        sheets = [Image.open(tmp_path / name / "samples" / f"step-00000002-{kind}.png") for name in ("one", "two")]
        mine, theirs = (np.asarray(sheet, np.int16) for sheet in sheets)
        assert mine.shape == theirs.shape
        assert int(np.abs(mine - theirs).max()) <= 1  # a value on the edge between two levels may fall on either side


def refused(folder: Path) -> str:
    try:
        Trainer(tiny_recipe("training.batch_size=15"), folder)
    except UserError as error:
        return str(error)
    return "not refused"


def refused_folder(folder: Path) -> str:
    try:
        Trainer(tiny_recipe(), folder)
    except UserError as error:
        return str(error)
    return "not refused"


def refusals(folder: Path, taken: Path) -> list[str]:
    return [refused(folder), refused_folder(taken)]


def test_mistakes_are_told_by_all_so_that_none_waits(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for told in together(2, refusals, tmp_path / "run", tmp_path):
        assert "a batch of 15 cannot be divided among 2 processes" in told[0]
        assert "holds other files and no run" in told[1]


def test_micro_batches_change_nothing_but_the_last_bits(tmp_path: Path) -> None:
    one = walk(tmp_path / "one", ())
    several = walk(tmp_path / "several", ("training.micro_batch=5",))
    for mine, theirs in zip(several.outcomes, one.outcomes, strict=True):
        assert torch.equal(mine.times, theirs.times)
        torch.testing.assert_close(mine.per_sample, theirs.per_sample, rtol=1e-4, atol=0)  # as above
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)
        for name in ("one", "several")
    ]
    assert [state["optimisers"]["network"]["state"][0]["step"] for state in states] == [6, 6]
    assert_nearly_same(*(weights_of(tmp_path / name, "ema") for name in ("one", "several")))


def test_another_micro_batch_on_resume_is_told(tmp_path: Path) -> None:
    train(tiny_recipe(*SHORT, "training.decay=constant"), tmp_path)
    more = tiny_recipe(*SHORT, "training.decay=constant", "training.steps=7", "training.micro_batch=4")
    notices = [p.notice for p in train(more, tmp_path) if p.notice]
    assert any("made with micro_batch 16, this is 4: bits may differ" in notice for notice in notices)
