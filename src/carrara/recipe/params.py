"""Params dataclasses from a recipe's keys, and a sentence for what pydantic complains of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from carrara.errors import UserError, nearest


def params_from(kind: type, given: Mapping[str, Any], decided: Mapping[str, Any], section: str = "network") -> Any:
    """A params dataclass from a section's keys and from what the rest of the recipe decides.

    Raises:
        UserError: an unknown key, one that is decided elsewhere, or a wrong type.
    """
    import dataclasses

    from pydantic import TypeAdapter

    known = {field.name for field in dataclasses.fields(kind)}
    for key in given:
        if key in decided:
            raise UserError(f"{section}.{key} follows from the data and the rest of the recipe: leave it out.")
        if key not in known:
            raise UserError(f"the recipe has an unknown key '{section}.{key}': {nearest(key, known - decided.keys())}")
    try:
        return TypeAdapter(kind).validate_python({**given, **decided})
    except ValidationError as error:
        raise UserError(sentence(error, prefix=f"{section}."), **key_and_code(error, f"{section}.")) from None


def key_and_code(error: ValidationError, prefix: str = "") -> dict[str, Any]:
    """The `key` and `code` of the first of pydantic's complaints, as `UserError` takes them."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return {"key": cause.key, "code": cause.code}
    codes = {"extra_forbidden": "unknown", "missing": "missing"}
    return {"key": prefix + ".".join(map(str, first["loc"])), "code": codes.get(first["type"], "invalid")}


def sentence(error: ValidationError, model: type[BaseModel] | None = None, prefix: str = "") -> str:
    """The first of pydantic's complaints as one sentence that names the key.

    Args:
        model: what was validated, where it has sections: the nearest of its keys is named for an unknown one.
        prefix: the section that was validated, with its full stop.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = prefix + ".".join(path)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        return f"the recipe has an unknown key '{key}': {nearest(path[-1], _known_keys(model, path[:-1]))}"
    if first["type"] == "missing":
        return f"the recipe lacks the key '{key}': add it, or use --set {key}=VALUE."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"the recipe's '{key}' is {first['input']!r}, but {message}."


def _known_keys(model: Any, path: Sequence[str]) -> list[str]:
    """The keys that a section may hold at a place."""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        choices = [annotation, *get_args(annotation)]  # a section that may be left out is one of a union
        model = next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
