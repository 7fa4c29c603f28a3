"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from carrara.errors import UserError


def make_folder(folder: Path) -> None:
    """Make a folder, and those it lies in, unless it is there.

    Raises:
        UserError: a file stands in the way, or the place is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        taken = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        reason = f"{taken} is a file" if taken else error.strerror or error
        raise UserError(f"the folder {folder} cannot be made ({reason}): name another one.") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: to a temporary name, synced, then renamed.

    Raises:
        UserError: the disk is full, or the folder not writable or no folder; what stood there before is untouched.
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
            f"{path} could not be written ({error.strerror or error}): what stood there before is kept."
        ) from None
