"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from carrara.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: to a temporary name, synced, then renamed.

    Raises:
        UserError: the disk is full or the folder not writable; what stood there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
