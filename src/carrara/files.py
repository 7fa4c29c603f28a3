"""Files that are there whole or not at all, and folders that one process at a time writes into."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from carrara.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def make_folder(folder: Path) -> None:
    """Make a folder and its parents unless they are there.

    Raises:
        UserError: a file is in the way, or the place is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        taken = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        reason = f"{taken} is a file" if taken else error.strerror or error
        raise UserError(
            f"the folder {folder} cannot be made ({reason}): name another one.", key=str(folder), code="resources"
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: to a temporary name, synced, then renamed.

    Raises:
        UserError: the disk is full, or the folder not writable or no folder; what was there before is untouched.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({error.strerror or error}): what was there before is kept.",
            key=str(path),
            code="resources",
        ) from None


def append_line(path: Path, line: str) -> None:
    """Add a line of JSON to a file, and wait until it is on the disk.

    Raises:
        UserError: the disk is full, or the file not writable.
    """
    try:
        with open(path, "ab") as file:
            file.write(json_bytes(line + "\n"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}): make room.", key=str(path), code="resources"
        ) from None


def json_bytes(text: str) -> bytes:
    """JSON as UTF-8. Half surrogates, which names that are not UTF-8 have, become JSON's own escapes of them."""
    return text.encode("utf-8", "backslashreplace")


def read_arrays(path: str | Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name: all, or those of some names that it has.

    Raises:
        UserError: there is no such file, or it is damaged or has Python objects.
    """
    import zipfile
    import zlib

    import numpy as np

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}.", key=str(path), code="missing")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a whole .npz file of plain arrays ({error}): write or download it again.",
            key=str(path),
            code="damaged",
        ) from None


_locks: set[IO[str]] = set()


def _release_all() -> None:
    """Forked data workers, which may live a moment longer than their parent, hold no folder."""
    for lock in _locks:
        lock.close()
    _locks.clear()


os.register_at_fork(after_in_child=_release_all)


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder and hold it; however this process ends, others may then have it.

    Args:
        busy: the sentence where another process holds it.

    Raises:
        UserError: it is held, cannot be made, or is not writable.
    """
    make_folder(folder)
    try:
        file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115 (closed below, or in a fork)
    except OSError as error:
        raise UserError(
            f"the folder {folder} is not writable ({error.strerror or error}): name another one.",
            key=str(folder),
            code="resources",
        ) from None
    _locks.add(file)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(busy, key=str(folder), code="busy") from None
        yield
    finally:
        _locks.discard(file)
        file.close()
