"""Checkpoints: one folder each, whole or not at all.

    checkpoints/step-00005000/  network.safetensors  ema.safetensors  state.pt  manifest.json

Of sharded weights each process writes its parts, and the last to finish the rest:

    checkpoints/step-00005000/  parts/process-00000.safetensors …  state.pt  manifest.json

Any number of processes resumes from either layout. The folder is written under a temporary name, synced and renamed;
the manifest with every file's checksum is written last, and a folder without a matching one does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from carrara.distributed import read_parts, write_parts
from carrara.errors import UserError
from carrara.training.state import join

_PARTS = "parts"
_LAST = "last"  # made by the process that completes the folder, and gone once it has its name
_NAME = re.compile(r"step-(\d{8})")


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def save(checkpoints: Path, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step.

    Args:
        weights: state dicts on the CPU by file name ("network", "ema").
        state: everything else, of types that `torch.load(weights_only=True)` reads back.

    Raises:
        UserError: the disk is full or the folder not writable; earlier checkpoints are untouched.
    """
    with _writing(checkpoints, step) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in weights.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial / f"{name}.safetensors")
        _complete(partial, checkpoints, step, state)
    return folder_of(checkpoints, step)


def save_parts(checkpoints: Path, step: int, parts: Mapping[str, Tensor], state: dict[str, Any]) -> bool:
    """Write this process's parts of the checkpoint of a step; no process waits for another.

    Args:
        parts: of `distributed.copy_parts`.
        state: everything else, the same on every process.

    Returns:
        Whether this process was the last, and completed the checkpoint.

    Raises:
        UserError: as `save`.
    """
    with _writing(checkpoints, step) as partial:
        (partial / _PARTS).mkdir(parents=True, exist_ok=True)
        if not write_parts(parts, partial / _PARTS):
            return False
        try:  # two may see all parts at the same time
            (partial / _LAST).touch(exist_ok=False)
        except (FileExistsError, FileNotFoundError):
            return False
        _complete(partial, checkpoints, step, state)
    (folder_of(checkpoints, step) / _LAST).unlink(missing_ok=True)
    return True


@contextmanager
def _writing(checkpoints: Path, step: int) -> Iterator[Path]:
    """The temporary folder of a checkpoint, which is removed when writing fails.

    Raises:
        UserError: writing failed.
    """
    final = folder_of(checkpoints, step)
    partial = final.with_name(f".{final.name}.partial")
    try:
        yield partial
    except (OSError, RuntimeError, SafetensorError) as error:  # how this file, torch and safetensors report a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the checkpoint {final} could not be written ({error}): free some space and run the same command again, "
            "it goes on from the newest whole checkpoint.",
            key=str(final),
            code="resources",
        ) from None


def _complete(partial: Path, checkpoints: Path, step: int, state: dict[str, Any]) -> None:
    """Write state and manifest, and give the folder its name."""
    final = folder_of(checkpoints, step)
    torch.save(state, partial / "state.pt")
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != _LAST)
    manifest = {"step": step, "files": {path.relative_to(partial).as_posix(): _checksum(path) for path in files}}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(checkpoints)


def newest(checkpoints: Path) -> tuple[int, list[str]]:
    """The step of the newest whole checkpoint (0 where there is none), and a sentence for every newer one that
    is not whole."""
    complaints: list[str] = []
    for step in sorted(_steps(checkpoints), reverse=True):
        complaint = _verify(folder_of(checkpoints, step))
        if complaint is None:
            return step, complaints
        complaints.append(complaint)
    return 0, complaints


Weights = dict[str, dict[str, Tensor]]


def load(checkpoints: Path, step: int, parts: bool = True) -> tuple[Weights, dict[str, Any]]:
    """The weights and the state of one step's checkpoint, whole, in whichever layout it was saved.

    Args:
        parts: whether to read what lies in parts; without them `join_parts` has to.
    """
    folder = folder_of(checkpoints, step)
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    weights: Weights = state.pop("weights", {})
    weights |= {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    if parts:
        join_parts(checkpoints, step, weights, state, {})
    return weights, state


def join_parts(
    checkpoints: Path, step: int, weights: Weights, state: dict[str, Any], like: Mapping[str, Tensor]
) -> None:
    """Add what lies in parts to the weights and the state of a checkpoint, placed as `distributed.read_parts` does."""
    folder = folder_of(checkpoints, step) / _PARTS
    if folder.is_dir():
        join(read_parts(folder, like), {"weights": weights, "optimisers": state["optimisers"]})


def prune(checkpoints: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Tidy up after the checkpoint of `step` was written.

    Kept are the newest `keep` up to this step, and those of every `keep_every` steps (0: none). Behind this step
    lie only checkpoints that were passed over as damaged.
    """
    steps = sorted(_steps(checkpoints))
    newest_ones = [s for s in steps if s <= step][-keep:]
    for old in steps:
        if old not in newest_ones and not (keep_every and old <= step and old % keep_every == 0):
            shutil.rmtree(folder_of(checkpoints, old), ignore_errors=True)


def tidy(checkpoints: Path) -> None:
    """Remove what killed writes left behind."""
    for partial in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def refuse_full_disk(checkpoints: Path, needed: int) -> None:
    """Stop before anything is trained where the checkpoints would not fit.

    Args:
        needed: bytes of all checkpoints that lie there at the same time.

    Raises:
        UserError: the disk has less room than that.
    """
    there = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    free = shutil.disk_usage(checkpoints.parent).free
    if free < needed - there:
        raise UserError(
            f"the checkpoints of this run need {(needed - there) / 1e9:,.2f} GB more on the disk of {checkpoints}, "
            f"where {free / 1e9:,.2f} GB are free: make room, name another --out, or lower training.keep_checkpoints.",
            key="training.keep_checkpoints",
            code="resources",
        )


class Writer:
    """Writes checkpoints in a thread while training continues, one after the other.

    Training only waits for a consistent copy of the state, and for the write before where that is still under way.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_lower_priority)
        self._current: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Wait for the previous write, then start this one."""
        self.wait()
        self._current = self._thread.submit(write)

    @property
    def failed(self) -> bool:
        """Whether the last write has failed; `wait` raises its error."""
        ended = self._current is not None and self._current.done()
        return ended and self._current is not None and self._current.exception() is not None

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: as `save`.
        """
        current, self._current = self._current, None
        if current is not None:
            current.result()

    def close(self) -> None:
        """Wait for the write in progress, even if it fails."""
        self._thread.shutdown(wait=True)


def _lower_priority() -> None:
    """Let training go first: checksums are in less of a hurry. Not last of all, since training waits for a write that
    is still under way when the next is due."""
    if sys.platform == "linux":  # where a single thread has a priority of its own
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + 5)


def _steps(checkpoints: Path) -> list[int]:
    if not checkpoints.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in checkpoints.iterdir())
    return [int(match[1]) for match in matches if match]


def _verify(folder: Path) -> str | None:
    """None where every file matches the manifest, else what is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, checksum in manifest["files"].items():
            if _checksum(folder / name) != checksum:
                return f"the checkpoint {folder} is damaged ({name} does not match its checksum) and was passed over."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the checkpoint {folder} is not whole ({error}) and was passed over."
    return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
