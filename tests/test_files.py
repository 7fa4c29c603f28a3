"""Files that are whole or not there, and folders of one process at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from carrara import files
from carrara.files import append_line, json_bytes, locked, write_whole
from tests.errors import refused


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked(folder, "it is held."), refused("busy", key=str(folder)), locked(folder, "it is held."):
        pass
    with locked(folder, "it is held."):
        pass
    with pytest.raises(ZeroDivisionError), locked(folder, "it is held."):
        raise ZeroDivisionError
    with locked(folder, "it is held."):
        pass


def hold(folder: Path, pipe: Any) -> None:
    with locked(folder, ""):
        pipe.send("held")
        signal.pause()


def live(pipe: Any) -> None:
    pipe.send("alive")
    signal.pause()


def test_what_a_killed_process_held_is_free_and_a_fork_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    near, far = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path, far))
    other.start()
    assert near.recv() == "held"
    with refused("busy"), locked(tmp_path, "it is held."):
        pass
    other.kill()
    other.join()
    with locked(tmp_path, "it is held."):
        child = context.Process(target=live, args=(far,))
        child.start()
        assert near.recv() == "alive"
    try:
        with locked(tmp_path, "it is held."):  # though the child lives
            pass
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("place", ["a file", "below a file", "not writable"])
def test_a_folder_that_cannot_be_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "below"}.get(place, tmp_path)
    if place == "not writable":  # root may write anywhere

        def fail(*arguments: Any, **options: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(files, "open", fail, raising=False)
    with refused("resources", key=str(folder)), locked(folder, ""):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_lines_are_added_and_names_that_are_no_text_survive_as_json(tmp_path: Path) -> None:
    path, entries = tmp_path / "lines", [{"name": os.fsdecode(b"caf\xe9")}, {"name": "café 𝄞"}]
    for entry in entries:
        append_line(path, json.dumps(entry, ensure_ascii=False))
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == entries
    assert json_bytes('"café"') == '"café"'.encode()
    with refused("resources", key=str(tmp_path)):
        append_line(tmp_path, "")


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("resources", key=str(path)):
        write_whole(path, b"after")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"
