"""What is kept, what is removed, and what is refused before anything is lost."""

from __future__ import annotations

import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.errors import UserError
from carrara.training import Trainer, checkpoint
from tests.runs import tiny_recipe


def written(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"network": {"weight": torch.full((2,), float(step))}}, {"step": step})


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir() if path.name.startswith("step"))


def test_one_process_alone_completes_a_checkpoint_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see all parts: the second while the first completes the folder, and again after it has its name."""
    monkeypatch.setattr(checkpoint, "write_parts", lambda parts, folder: True)
    complete, late = checkpoint._complete, []

    def completing(*arguments: Any) -> None:
        late.append(checkpoint.save_parts(tmp_path, 3, {}, {"step": 3}))
        complete(*arguments)

    monkeypatch.setattr(checkpoint, "_complete", completing)
    assert checkpoint.save_parts(tmp_path, 3, {}, {"step": 3})
    assert late == [False]
    assert checkpoint.newest(tmp_path) == (3, [])
    assert not list(tmp_path.rglob("last"))


def test_the_newest_and_every_so_many_are_kept(tmp_path: Path) -> None:
    written(tmp_path, 10, 20, 30, 40, 50)
    checkpoint.prune(tmp_path, 50, keep=2, keep_every=20)
    assert steps_of(tmp_path) == [20, 40, 50]
    checkpoint.prune(tmp_path, 50, keep=1)
    assert steps_of(tmp_path) == [50]


def test_a_damaged_newer_one_never_pushes_a_good_one_out(tmp_path: Path) -> None:
    written(tmp_path, 10, 11, 12)
    (tmp_path / "step-00000012" / "state.pt").write_bytes(b"")
    checkpoint.prune(tmp_path, 11, keep=1)
    assert steps_of(tmp_path) == [11]
    assert checkpoint.newest(tmp_path) == (11, [])


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written(tmp_path, 7)
    weights, state = checkpoint.load(tmp_path, 7)
    assert weights["network"]["weight"].tolist() == [7, 7]
    assert state == {"step": 7}


def test_a_full_disk_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="GB are free: make room") as error:
        Trainer(tiny_recipe(), tmp_path / "run")
    assert "training.keep_checkpoints" in str(error.value)
    monkeypatch.undo()
    Trainer(tiny_recipe(), tmp_path / "run").run.close()  # the folder is free for the next try


def test_leftovers_of_killed_writes_are_removed_at_the_start(tmp_path: Path) -> None:
    partial = tmp_path / "run" / "checkpoints" / ".step-00000020.partial"
    Trainer(tiny_recipe(), tmp_path / "run").run.close()
    partial.mkdir(parents=True)
    Trainer(tiny_recipe(), tmp_path / "run").run.close()
    assert not partial.exists()


def test_writes_happen_behind_the_training_and_one_after_the_other() -> None:
    writer, may_end, order = checkpoint.Writer(), threading.Event(), list[str]()

    def slow() -> None:
        may_end.wait(10)
        order.append("first")

    writer.start(slow)
    order.append("training goes on")
    may_end.set()
    writer.start(lambda: order.append("second"))
    writer.wait()
    assert order == ["training goes on", "first", "second"]
    writer.close()


def test_a_failed_write_is_told_once() -> None:
    writer = checkpoint.Writer()

    def fail() -> None:
        raise UserError("no room")

    writer.start(fail)
    while not writer.failed:
        pass
    with pytest.raises(UserError, match="no room"):
        writer.wait()
    assert not writer.failed
    writer.wait()
    writer.close()


def test_the_copy_that_is_written_does_not_change_with_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being written must not see the steps that follow."""
    trainer = Trainer(tiny_recipe(), tmp_path)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    may_write = threading.Event()
    honest = checkpoint.save

    def late(*arguments: Any) -> Path:
        may_write.wait(10)
        return honest(*arguments)

    monkeypatch.setattr(checkpoint, "save", late)
    trainer.one_step(trainer.batches.at(0))
    after = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.save_checkpoint()
    trainer.one_step(trainer.batches.at(1))
    may_write.set()
    trainer.writer.wait()
    weights, _ = checkpoint.load(tmp_path / "checkpoints", 1)
    assert all(torch.equal(weights["network"][key], value) for key, value in after.items())
    assert any(not torch.equal(before[key], value) for key, value in after.items())
    trainer.writer.close()
    trainer.run.close()
