"""Recipes from files and from the command line: read, changed by assignments, validated."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from carrara.errors import UserError, nearest
from carrara.recipe.whole import RECIPE, AnyRecipe


def validate(data: Mapping[str, Any], origin: str = "the recipe") -> AnyRecipe:
    """A recipe from plain data.

    Raises:
        UserError: names the first wrong key, and for an unknown one the nearest known.
    """
    try:
        return RECIPE.validate_python(data)
    except ValidationError as error:
        raise _refusal(error, origin) from None


def _refusal(error: ValidationError, origin: str) -> UserError:
    """The first of pydantic's complaints as one sentence that names the key."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    cause, message = first.get("ctx", {}).get("error"), first["msg"][0].lower() + first["msg"][1:]
    match first["type"]:
        case _ if isinstance(cause, UserError):
            own = cause.key if "." in cause.key or not key else key
            return UserError(str(cause).replace("the recipe", origin, 1), key=own, code=cause.code)
        case "conflict":
            return UserError(f"{key} {message}", key=key, code="conflict")
        case "unknown":
            return UserError(f"{origin} has an unknown key '{key}': {message}", key=key, code="unknown")
        case "missing":
            sentence = f"{origin} lacks the key '{key}': add it, or use --set {key}=VALUE."
            return UserError(sentence, key=key, code="missing")
        case "literal_error" | "unknown_value":
            known = re.findall(r"'([^']+)'", first.get("ctx", {}).get("expected", ""))
            near = nearest(str(first["input"]), known) if known else message
            return UserError(f"{origin}'s '{key}' is {first['input']!r}: {near}", key=key, code="unknown")
        case "string_type":
            message = "a text is needed: write it in quotes"
    return UserError(f"{origin}'s '{key}' is {first['input']!r}, but {message}.", key=key)


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `section.key=value` assignments, values being YAML, to plain recipe data (a changed copy).

    Raises:
        UserError: an assignment without "=", or a path through something that is no section.
    """
    data = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"--set {assignment} is not of the form section.key=value.", key="set")
        *sections, key = path.strip().split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {assignment}: '{section}' is a value, not a section of the recipe.", key=path)
        try:
            place[key] = _plain(yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: '{text}' cannot be read as a YAML value.", key=path) from None
    return data


def _plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; a recipe means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def shipped() -> list[str]:
    """The names of the recipes that come with Carrara."""
    folder = resources.files("carrara") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read(name: str | Path) -> dict[str, Any]:
    """The plain data of a shipped recipe, or of a YAML file.

    Raises:
        UserError: neither a shipped recipe nor a readable YAML mapping.
    """
    if isinstance(name, str) and name in shipped():
        text = (resources.files("carrara") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"there is no recipe '{name}': {nearest(str(name), shipped())}", key=str(name), code="missing"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {path} cannot be read: {error}.", key=str(path), code="damaged") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the recipe {name} is not valid YAML: {reason}.", key=str(name), code="damaged") from None
    if not isinstance(data, dict):
        raise UserError(f"the recipe {name} has no sections: it must be a YAML mapping.", key=str(name), code="damaged")
    plain: dict[str, Any] = _plain(data)
    return plain


def load(name: str | Path, assignments: Sequence[str] = ()) -> AnyRecipe:
    """A shipped recipe or a YAML file, with overrides, validated."""
    return validate(override(read(name), assignments), f"the recipe {name}")
