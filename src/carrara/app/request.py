"""What all requests have in common: typed, frozen, refused in one sentence; and the checks before long work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from carrara.errors import UserError, nearest


class Request(BaseModel):
    """A use case's input: nothing changes once it is made, and an unknown field is refused.

    Raises:
        UserError: the first field that is missing, unknown or of a wrong type or range, as its key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(error, type(self)) from None


def parse_resolution(value: Any) -> Any:
    """Height and width from "64" or "64x96"; anything but text as it is.

    Raises:
        UserError: a text of another form.
    """
    if not isinstance(value, str):
        return value
    sides = value.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"--resolution is N or HxW, such as 64 or 64x96, not '{value}'.", key="resolution")
    return int(sides[0]), int(sides[-1])


Resolution = Annotated[tuple[int, int], BeforeValidator(parse_resolution)]


def _refusal(error: ValidationError, model: type[BaseModel]) -> UserError:
    """The first of pydantic's complaints."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    if first["type"] == "missing":
        return UserError(f"{key} is missing: it has to be given.", key=key, code="missing")
    if first["type"] == "extra_forbidden":
        return UserError(f"there is no {key}: {nearest(key, model.model_fields)}", key=key, code="unknown")
    if first["type"] == "greater_than_equal":
        return UserError(f"{key} must be at least {first['ctx']['ge']}, not {first['input']!r}.", key=key)
    message = first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"{key} is {first['input']!r}, but {message.removeprefix('value error, ')}.", key=key)


def check_file(path: Path | None, key: str) -> None:
    """Raises UserError unless a file can be written at `path`."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file with --{key}.", key=key, code="exists")
    check_folder(path.absolute().parent, key)


def check_folder(path: Path, key: str) -> None:
    """Raises UserError unless `path` is a folder that can be written to, or can be made."""
    there = path.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if not there.is_dir():
        raise UserError(
            f"{there} is no folder, so nothing can be written to {path}: name another.", key=key, code="exists"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the folder {there} cannot be written to: name another.", key=key, code="unsupported")
