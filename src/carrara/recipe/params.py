"""Params dataclasses from a recipe's keys, and one sentence for what pydantic complains about."""

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
        path = f"{section}.{key}"
        if key in decided:
            raise UserError(
                f"{path} follows from the data and the rest of the recipe: leave it out.", key=path, code="conflict"
            )
        if key not in known:
            near = nearest(key, known - decided.keys())
            raise UserError(f"the recipe has an unknown key '{path}': {near}", key=path, code="unknown")
    try:
        return TypeAdapter(kind).validate_python({**given, **decided})
    except ValidationError as error:
        raise complaint(error, prefix=f"{section}.") from None


def complaint(
    error: ValidationError, model: type[BaseModel] | None = None, prefix: str = "", origin: str = "the recipe"
) -> UserError:
    """The first of pydantic's complaints as one sentence that names the key.

    Args:
        model: what was validated, where it has sections: the nearest of its keys is named for an unknown one.
        prefix: the section that was validated, with its full stop.
        origin: what was validated, in words.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = prefix + ".".join(path)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return UserError(str(cause).replace("the recipe", origin, 1), key=cause.key or key, code=cause.code)
    if first["type"] == "extra_forbidden":
        near = nearest(path[-1], _known_keys(model, path[:-1]))
        return UserError(f"{origin} has an unknown key '{key}': {near}", key=key, code="unknown")
    if first["type"] == "missing":
        return UserError(f"{origin} lacks the key '{key}': add it, or use --set {key}=VALUE.", key=key, code="missing")
    message = first["msg"][0].lower() + first["msg"][1:]
    return UserError(f"{origin}'s '{key}' is {first['input']!r}, but {message}.", key=key)


def _known_keys(model: Any, path: Sequence[str]) -> list[str]:
    """The keys that a section may have at a place."""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        choices = [annotation, *get_args(annotation)]  # a section that may be left out is one of a union
        model = next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
