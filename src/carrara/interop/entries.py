"""The entries of other programs' configs, checked by type before any of them is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from carrara.errors import UserError


def check_entries(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    optional: Mapping[str, type] | None = None,
    per_level: Collection[str] = (),
) -> None:
    """Raises UserError unless every entry of a config that has a default is of the default's type.

    Args:
        config: the entries; those without a default are not looked at.
        defaults: by name. Whole numbers must be at least 1, others finite; a tuple's elements are as its first.
        optional: the types of entries that may be null.
        per_level: entries that may be one value, or a list with one for each level.
    """
    optional = optional or {}
    for name, value in config.items():
        if name in optional:
            kind: Any = optional[name]
            if value is None:
                continue
        elif name in defaults and defaults[name] is not None:
            kind = type(defaults[name])
        else:
            continue
        if kind is tuple:
            kind = type(defaults[name][0])
            fits = isinstance(value, list | tuple) and bool(value) and all(_is(kind, each) for each in value)
        elif name in per_level and isinstance(value, list | tuple):
            fits = bool(value) and all(_is(kind, each) for each in value)
        else:
            fits = _is(kind, value)
        if not fits:
            raise UserError(f"the config's {name} is {value!r}: {_expected(kind)} is expected.", key=name)


def check_numbers(values: Any, name: str, *, zero: bool = True) -> None:
    """Raises UserError unless an entry is null or a list of finite numbers, which may be 0 unless stated."""
    if values is None:
        return
    fits = isinstance(values, list | tuple) and bool(values)
    if not fits or not all(_is(float, value) and (zero or value != 0) for value in values):
        kind = "finite numbers" if zero else "finite numbers other than 0"
        raise UserError(f"the config's {name} is {values!r}: a list of {kind} is expected.", key=name)


def _is(kind: type, value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _expected(kind: type) -> str:
    names = {bool: "true or false", int: "a whole number of at least 1", float: "a finite number", str: "a text"}
    return names.get(kind, f"a {kind.__name__}")
