"""Recipes from files and from the command line: read, changed by assignments, validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from carrara.errors import UserError, nearest
from carrara.recipe.params import complaint
from carrara.recipe.whole import Recipe


def validate(data: Mapping[str, Any], origin: str = "the recipe") -> Recipe:
    """A recipe from plain data.

    Raises:
        UserError: names the first wrong key, and for an unknown one the nearest known.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise complaint(error, Recipe, origin=origin) from None


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `section.key=value` assignments, values being YAML, to plain recipe data (a changed copy).

    Raises:
        UserError: an assignment without "=", or a path through something that is no section.
    """
    import copy

    data = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"--set {assignment} is not of the form section.key=value.")
        *sections, key = path.strip().split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {assignment}: '{section}' is a value, not a section of the recipe.")
        try:
            place[key] = _plain(yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: '{text}' cannot be read as a YAML value.") from None
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
            raise UserError(f"there is no recipe '{name}': {nearest(str(name), shipped())}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {path} cannot be read: {error}.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {name} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise UserError(f"the recipe {name} holds no sections: it must be a YAML mapping.")
    plain: dict[str, Any] = _plain(data)
    return plain


def load(name: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """A shipped recipe or a YAML file, with overrides, validated."""
    return validate(override(read(name), assignments), f"the recipe {name}")
