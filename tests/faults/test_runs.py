"""A run that meets a fault says so in one sentence, loses nothing beyond its last checkpoint, and ends in its bits."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carrara.data import Batch
from carrara.errors import UserError
from carrara.recipe import Recipe
from carrara.training import Trainer
from tests.data.builders import files, folder, png, tarred
from tests.errors import refused
from tests.processes import together
from tests.runs import tiny_recipe, train
from tests.training.test_loop import assert_same_bits

LAST = 16
"""Two workers are six batches ahead: what strikes after step 5 is met by step 12."""


def recipe_of(data: Path, *assignments: str) -> Recipe:
    return tiny_recipe(
        f"data.path={data}",
        "data.cache=none",  # so few images would be read once and never again
        "data.channels=3",
        "conditioning.kind=none",
        "sampling.guidance=1",
        "sampling.count=2",
        f"training.steps={LAST}",
        "training.batch_size=4",
        "training.checkpoint_every=2",
        "training.log_every=2",
        "training.tracker=none",
        *assignments,
    )


def walked(trainer: Trainer, meanwhile: Callable[[int], None]) -> list[str]:
    """Walk to the end with something happening after every step; the notices."""
    notices = []
    for progress in trainer.steps():
        if progress.notice is None:
            meanwhile(progress.step)
        else:
            notices.append(progress.notice)
    return notices


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file of this process grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (20_000, "the checkpoint .*step-00000004 could not be written .*File too large.*run the same command again"),
        (1, "the log .*log.jsonl could not be written .*File too large.*run the same command again"),
    ],
    ids=["checkpoint", "log"],
)
def test_a_disk_that_fills_up_mid_run(size: int, sentence: str, tmp_path: Path) -> None:
    recipe = recipe_of(folder(tmp_path / "data", files(12)))
    train(recipe, tmp_path / "straight")
    trainer = Trainer(recipe, tmp_path / "broken")
    steps = trainer.steps()
    while next(steps).step < 3:
        pass
    trainer.writer.wait()
    with largest_file(size), pytest.raises(UserError, match=sentence):
        list(steps)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000002"]
    train(recipe, tmp_path / "broken")
    assert_same_bits(tmp_path / "straight", tmp_path / "broken", LAST)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_mid_run(workers: int, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(2):
        tarred(data / f"{number}.tar", {f"{i:02d}.png": png(i) for i in range(6 * number, 6 * number + 6)})
    recipe = recipe_of(data, f"data.workers={workers}")
    train(recipe, tmp_path / "straight")

    def lose(step: int) -> None:
        if step == 5:
            (data / "1.tar").rename(tmp_path / "lost")

    with pytest.raises(UserError, match=r"the shard .*1\.tar is gone: put it back, then continue\.$"):
        walked(Trainer(recipe, tmp_path / "broken"), lose)
    (tmp_path / "lost").rename(data / "1.tar")
    assert (tmp_path / "broken" / "checkpoints" / "step-00000004").exists() or workers
    train(recipe, tmp_path / "broken")
    assert_same_bits(tmp_path / "straight", tmp_path / "broken", LAST)


def met(data: Path, run: Path) -> str:
    """Train on the second process's half of a data set that is partly gone; what this process says."""
    trainer = Trainer(recipe_of(data), run)
    honest = trainer.batches.at

    def at(step: int) -> Batch:
        if step == 3 and trainer.processes.rank == 1:
            raise UserError("the shard 1.tar is gone: put it back, then continue.")
        batch = honest(step)
        assert isinstance(batch, Batch)
        return batch

    trainer.batches.at = at  # type: ignore[method-assign]
    try:
        list(trainer.steps())
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_fault_of_one_process_stops_all_so_that_none_waits(tmp_path: Path) -> None:
    first, second = together(2, met, folder(tmp_path / "data", files(12)), tmp_path / "run")
    assert second.startswith("the shard 1.tar is gone")
    assert first == "another process cannot go on: its own message has the reason."


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_becomes_unreadable_mid_run_is_named_when_it_is_met(workers: int, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", files(12))
    recipe = recipe_of(data, "data.unreadable_limit=0.1", f"data.workers={workers}")

    def damage(step: int) -> None:
        if step == 2:
            (data / "007.png").write_bytes(b"")

    notices = walked(Trainer(recipe, tmp_path / "run"), damage)
    assert notices == ["007.png cannot be read (the file is empty): another image replaces it."]
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_more_images_than_the_limit_that_become_unreadable_stop_the_run(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", files(12))
    recipe = recipe_of(data, "data.unreadable_limit=0.1")

    def damage(step: int) -> None:
        if step == 2:
            for number in range(6):
                (data / f"{number:03d}.png").write_bytes(b"")

    with refused("damaged", key="data.unreadable_limit"):
        walked(Trainer(recipe, tmp_path / "run"), damage)
    folder(data, files(12))
    again = Trainer(recipe, tmp_path / "run")
    assert again.step == 2
    again.run.close()


def test_killed_workers_change_no_bit(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", files(12))
    train(recipe_of(data), tmp_path / "straight")

    def strike(step: int) -> None:
        if step in (2, 5):
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)

    walked(Trainer(recipe_of(data, "data.workers=2"), tmp_path / "struck"), strike)
    assert_same_bits(tmp_path / "straight", tmp_path / "struck", LAST)


@pytest.mark.parametrize("clock", ["wall", "monotonic"])
def test_a_clock_that_jumps_changes_no_bit(clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day ahead, a day back, and standing still: neither an error nor a false alarm, and the same run."""
    recipe = recipe_of(folder(tmp_path / "data", files(12)))
    train(recipe, tmp_path / "straight")
    trainer = Trainer(recipe, tmp_path / "jumped")
    honest = time.time if clock == "wall" else trainer.phases.clock
    jumps = {2: lambda: honest() + 86_400, 3: lambda: honest() - 86_400, 4: lambda: 0.0, 6: honest}

    def jump(step: int) -> None:
        if step in jumps and clock == "wall":
            monkeypatch.setattr(time, "time", jumps[step])
        elif step in jumps:
            trainer.phases.clock = jumps[step]

    assert walked(trainer, jump) == []
    assert_same_bits(tmp_path / "straight", tmp_path / "jumped", LAST)
