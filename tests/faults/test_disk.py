"""Full disks and damaged files: nothing is lost beyond the last whole checkpoint."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from carrara.errors import UserError
from carrara.files import write_whole
from carrara.training import Trainer, checkpoint
from tests.runs import tiny_recipe, train


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_is_needed_is_named_and_kept(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_bytes(b"precious")
    for path in (taken / "config.json", taken / "below" / "config.json"):
        with pytest.raises(UserError, match=r"cannot be made \(.*taken is a file\)"):
            write_whole(path, b"new")
    assert taken.read_bytes() == b"precious"


@pytest.mark.parametrize("victim", ["save_file", "torch.save", "os.fsync", "os.rename"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    trainer = Trainer(tiny_recipe(), tmp_path)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    steps = trainer.steps()
    while next(steps).step < 6:
        pass
    trainer.writer.wait()  # the checkpoint of step 5 is written in the background; only the next one is to fail
    monkeypatch.setattr(f"carrara.training.checkpoint.{victim}", full)
    with pytest.raises(UserError, match="could not be written") as error:
        list(steps)
    assert "run the same command again" in str(error.value)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert Trainer(tiny_recipe(), tmp_path).step == 5


@pytest.mark.parametrize("file", ["network.safetensors", "ema.safetensors", "state.pt", "manifest.json"])
def test_one_flipped_byte_or_a_missing_file_falls_back_to_the_checkpoint_before(
    tiny_run: Path, tmp_path: Path, file: str
) -> None:
    checkpoints = Path(shutil.copytree(tiny_run / "checkpoints", tmp_path / "checkpoints"))
    path = checkpoints / "step-00000012" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    step, complaints = checkpoint.newest(checkpoints)
    assert step == 10
    assert "step-00000012" in complaints[0]
    assert "passed over" in complaints[0]
    path.unlink()
    assert checkpoint.newest(checkpoints)[0] == 10


def test_the_run_says_that_it_fell_back_and_ends_in_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (folder / "checkpoints" / "step-00000012" / "ema.safetensors").write_bytes(b"")
    notices = [p.notice for p in train(tiny_recipe(), folder) if p.notice]
    assert any("ema.safetensors does not match" in notice for notice in notices)
    assert "resuming from the checkpoint of step 10." in notices
    for name in ("network", "ema"):
        parts = ("checkpoints", "step-00000012", f"{name}.safetensors")
        assert folder.joinpath(*parts).read_bytes() == tiny_run.joinpath(*parts).read_bytes()


def test_leftovers_of_a_killed_write_do_not_count(tmp_path: Path) -> None:
    partial = tmp_path / ".step-00000020.partial"
    partial.mkdir()
    (partial / "network.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000010").mkdir()
    step, complaints = checkpoint.newest(tmp_path)
    assert step == 0
    assert len(complaints) == 1
