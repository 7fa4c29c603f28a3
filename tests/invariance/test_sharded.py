"""Checkpoints of sharded weights: each process writes its parts, any number of processes goes on from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carrara import distributed
from carrara.training import Trainer, checkpoint
from carrara.training.log import Log
from tests.processes import together
from tests.runs import tiny_recipe
from tests.training.test_loop import final_state, log_of

RECIPE = tiny_recipe(
    "training.parallel=fsdp",
    "training.steps=6",
    "training.checkpoint_every=3",
    "training.sample_every=6",
    "training.log_every=2",
    "training.tracker=none",
    "training.batch_size=12",
)


def run(folder: Path, prepare: Callable[[Trainer], None] | None = None) -> str:
    """Train to the end; the name of what ended the run, on this process."""
    trainer = Trainer(RECIPE, folder)
    if prepare:
        prepare(trainer)
    try:
        for _ in trainer.steps():
            pass
    except BaseException as error:
        return type(error).__name__
    return "completed"


def runs(plans: list[tuple[Path, Callable[[Trainer], None] | None]]) -> list[str]:
    return [run(*plan) for plan in plans]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("sharded") / "straight"
    assert together(2, run, folder) == ["completed"] * 2
    return folder


def broken_off(straight: Path, folder: Path) -> Path:
    """The run as it was after step 3."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    return folder


def test_each_process_writes_its_parts_and_the_model_is_whole(straight: Path) -> None:
    folder = straight / "checkpoints" / "step-00000006"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        "manifest.json",
        "parts/process-00000.safetensors",
        "parts/process-00001.safetensors",
        "state.pt",
    ]
    first, second = (sum(value.numel() for value in load_file(folder / name).values()) for name in files[1:3])
    assert 0.5 < second / first <= 1, "each holds about half of everything"
    weights, state = checkpoint.load(straight / "checkpoints", 6)
    model = load_file(straight / "model" / "network.safetensors")
    assert model.keys() == weights["ema"].keys()
    assert all(torch.equal(value, weights["ema"][key]) for key, value in model.items())
    assert {"exp_avg", "exp_avg_sq", "step"} == state["optimisers"]["network"]["state"][0].keys()


def test_a_damaged_part_is_found(straight: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    part = folder / "checkpoints" / "step-00000006" / "parts" / "process-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    newest, complaints = checkpoint.newest(folder / "checkpoints")
    assert newest == 3
    assert "process-00001" in complaints[0]


def test_three_processes_and_one_go_on_from_two(straight: Path, tmp_path: Path) -> None:
    assert together(3, run, broken_off(straight, tmp_path / "three")) == ["completed"] * 3
    assert run(broken_off(straight, tmp_path / "one")) == "completed"
    for name in ("three", "one"):
        for mine, theirs in zip(log_of(tmp_path / name), log_of(straight), strict=True):
            # float32 sums of other batch sizes, for three steps
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def first_cannot_log(trainer: Trainer) -> None:
    """The disk of the log is full at step 4, on the one process that writes it."""

    def full(log: Log, entry: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    if trainer.step == 0:
        monkey = pytest.MonkeyPatch()
        honest = trainer.stepper.step

        def step(*arguments: Any) -> Any:
            if arguments[2] == 3:
                monkey.setattr(Log, "write", full)
            return honest(*arguments)

        trainer.stepper.step = step  # type: ignore[method-assign, assignment]


def second_fails(trainer: Trainer) -> None:
    """What no one foresees, between two steps of the second process."""
    honest = trainer.one_step

    def one_step(batch: Any) -> Any:
        if trainer.step == 5 and os.environ["RANK"] == "1":
            raise ZeroDivisionError
        return honest(batch)

    trainer.one_step = one_step  # type: ignore[method-assign]


def all_fail(trainer: Trainer) -> None:
    """Data that are gone for all."""
    honest = trainer.one_step

    def one_step(batch: Any) -> Any:
        if trainer.step == 4:
            raise OSError(5, "Input/output error")
        return honest(batch)

    trainer.one_step = one_step  # type: ignore[method-assign]


@pytest.mark.parametrize(("fails", "step"), [(first_cannot_log, 4), (second_fails, 5), (all_fail, 4)])
def test_a_run_that_ends_on_some_process_is_saved_by_all(
    straight: Path, tmp_path: Path, fails: Callable[[Trainer], None], step: int
) -> None:
    ended = together(2, run, tmp_path / "run", fails)
    assert "completed" not in ended
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == (step, [])
    assert together(2, run, tmp_path / "run") == ["completed"] * 2
    mine, theirs = (final_state(folder, 6) for folder in (tmp_path / "run", straight))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)
    assert log_of(tmp_path / "run")[-1]["step"] == 6  # of a full disk a line may be missing


def no_room(trainer: Trainer) -> None:
    def full(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    if os.environ["RANK"] == "1":
        pytest.MonkeyPatch().setattr(checkpoint, "write_parts", full)


def test_a_part_that_cannot_be_written_ends_the_run_on_all(tmp_path: Path) -> None:
    assert together(2, run, tmp_path / "run", no_room) == ["UserError"] * 2
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] == 0


def test_what_is_copied_does_not_change_with_training() -> None:
    assert together(2, copied_parts_stay) == [True, True]


def copied_parts_stay() -> bool:
    network = torch.nn.Linear(5, 3)
    distributed.start()
    distributed.shard(network, (), torch.device("cpu"))
    parts = distributed.copy_parts(network.state_dict())
    before = {key: distributed.local(value).clone() for key, value in parts.items()}
    with torch.no_grad():
        for parameter in network.parameters():
            distributed.local(parameter).zero_()
    return all(torch.equal(distributed.local(parts[key]), value) for key, value in before.items())
