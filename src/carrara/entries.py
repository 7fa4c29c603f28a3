"""Plain data (JSON, YAML) as typed values: one reader for our own configs and for those of other programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from carrara.errors import UserError, nearest

T = TypeVar("T")

REQUIRED: Any = object()
"""The default of an entry that must be there."""


@dataclass(frozen=True)
class Entry:
    """What an entry of a config may be.

    Attributes:
        kind: its type: `int`, `float` (finite), `bool`, `str`, `dict`, `Literal`, `tuple[…]` (a list, too), a union of
            them, or `Any`.
        default: the value where it is left out.
        least: whole numbers are at least this (the default may be below).
        only: the values that are supported; empty for all.
        zero: whether numbers may be 0.
        empty: whether a list may be empty.
    """

    kind: Any
    default: Any = REQUIRED
    least: int = 1
    only: tuple[Any, ...] = ()
    zero: bool = True
    empty: bool = False


IGNORED = Entry(Any, None)
"""An entry that changes nothing here."""


def fixed(*values: Any) -> Entry:
    """An entry of which only these values are supported; the first is the default."""
    return Entry(Any, values[0], only=values)


def read_entries(
    config: Mapping[str, Any], entries: Mapping[str, Entry], owner: str, *, others: bool = False
) -> dict[str, Any]:
    """Every entry by name, with lists as tuples, and with defaults where they are left out.

    Args:
        config: what a file contains.
        entries: what it may contain.
        owner: what it belongs to, for sentences ("config.json").
        others: pass over entries that are not known.

    Raises:
        UserError: an entry is unknown (the nearest is named), missing, of another type, or not supported.
    """
    for name in config:
        if name not in entries and not others:
            hint = nearest(str(name), entries)
            hint = hint if hint.startswith("did") or len(entries) < 20 else "it may be of a newer version."
            raise UserError(f"{owner} has no entry '{name}': {hint}", key=name, code="unknown")
    result = {}
    for name, entry in entries.items():
        if name not in config and entry.default is REQUIRED:
            raise UserError(f"the entry {name} of {owner} is missing.", key=name, code="missing")
        value = config.get(name, entry.default)
        if name in config:
            value = typed(value, entry.kind, name, owner)
            _check_range(value, entry, name)
        if entry.only and value not in entry.only:
            raise UserError(
                f"{name} = {value!r} is not supported in {owner}: it must be {' or '.join(map(repr, entry.only))}.",
                key=name,
                code="unsupported",
            )
        result[name] = value
    return result


def construct(make: Callable[..., T], values: Mapping[str, Any], section: str) -> T:
    """Call a function, or make a dataclass, with plain data that is checked against its annotations.

    Args:
        make: takes the values by name; whatever else is wrong with them it refuses itself.
        values: plain data.
        section: the key that the names belong to.

    Raises:
        UserError: a value is unknown (the nearest is named), missing or of another type.
    """
    kinds, required = _parameters(make)
    for name in values.keys() - kinds.keys():
        key = f"{section}.{name}"
        raise UserError(f"{key} is unknown: {nearest(str(name), kinds)}", key=key, code="unknown")
    for name in required - values.keys():
        raise UserError(f"{section}.{name} is missing.", key=f"{section}.{name}", code="missing")
    return make(**{name: typed(value, kinds[name], f"{section}.{name}") for name, value in values.items()})


def typed_fields(instance: Any, section: str) -> dict[str, Any]:
    """The fields of a dataclass, checked against its annotations, lists as tuples.

    Raises:
        UserError: a value is of another type.
    """
    make: Callable[..., Any] = type(instance)
    kinds, _ = _parameters(make)
    return {name: typed(getattr(instance, name), kind, f"{section}.{name}") for name, kind in kinds.items()}


def typed(value: Any, kind: Any, key: str, owner: str = "") -> Any:
    """The same value, lists as tuples.

    Raises:
        UserError: it is of another kind, or an unknown word (the nearest is named).
    """
    if not _fits(value, kind):
        shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:97]}…"
        where = f" in {owner}" if owner else ""
        words = _choices(kind)
        if words and isinstance(value, str):
            raise UserError(f"{key} is '{value}'{where}: {nearest(value, words)}", key=key, code="unknown")
        raise UserError(f"{key} is {shown}{where}: {_words(kind)} is expected.", key=key)
    return _plain(value)


@cache
def _parameters(make: Callable[..., Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The annotations of a function's or dataclass's arguments, and those without a default."""
    arguments = signature(make).parameters
    try:
        hints = get_type_hints(make)
    except NameError:  # names that exist for type checkers only
        hints = {}
    kinds = {name: hints.get(name, Any) for name in arguments}
    return kinds, frozenset(name for name, argument in arguments.items() if argument.default is Parameter.empty)


def _check_range(value: Any, entry: Entry, name: str) -> None:
    """Raises UserError unless the numbers of an entry are within its range."""
    if value == () and not entry.empty:
        raise UserError(f"{name} is an empty list: it must have at least one entry.", key=name)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool | str | NoneType | dict) or number == entry.default:
            continue
        if number == 0 and not entry.zero:
            raise UserError(f"{name} is {value}: it must not be 0.", key=name)
        if _counts(entry.kind) and number < entry.least:
            raise UserError(f"{name} is {value}: it must be at least {entry.least}.", key=name)


def _choices(kind: Any) -> list[str]:
    """The texts among the values of a kind."""
    if get_origin(kind) is Literal:
        return [each for each in get_args(kind) if isinstance(each, str)]
    return [word for inner in get_args(kind) for word in _choices(inner)]


@cache
def _counts(kind: Any) -> bool:
    """Whether the numbers of a kind are whole."""
    return kind is int or any(map(_counts, get_args(kind)))


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or kind is None:
        return kind is Any or value is None
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, _LISTS) or (origin is tuple and inner[1:] != (...,) and len(inner) != len(value)):
            return False
        return all(_fits(each, inner[0]) for each in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return not isinstance(origin or kind, type) or isinstance(value, origin or kind)


_LISTS = (list, tuple, set, frozenset)
_WORDS = {
    None: "null",
    NoneType: "null",
    bool: "a boolean (true or false)",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    dict: "a table of entries",
}


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (tuple, list, Sequence):
        return f"a list of {_words(inner[0]).removeprefix('a ')}s"
    return _WORDS.get(origin or kind, f"a {getattr(kind, '__name__', kind)}")


def _plain(value: Any) -> Any:
    """The same value with tuples for lists."""
    return tuple(map(_plain, value)) if isinstance(value, _LISTS) else value
