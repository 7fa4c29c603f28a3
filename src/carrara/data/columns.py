"""Which column of a table, or key of rows, holds the classes and which the captions; classes as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from carrara.data.source import printable
from carrara.errors import UserError, nearest

LABELS = ("label", "labels", "class", "fine_label", "category")
"""Names of class columns, in this order, where none is declared as one."""
CAPTIONS = ("text", "caption", "captions", "prompt", "description")
"""Names of caption columns, in this order."""
_NO_CAPTIONS = {*LABELS, "id", "key", "name", "file_name", "filename", "path", "url", "source", "license", "split"}
_LARGEST_NUMBER = 2**16 - 1
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?|nan|[+-]?inf", re.IGNORECASE)


def named(names: Sequence[str], columns: Iterable[str]) -> list[str]:
    """The columns of these names, in the names' order, whatever their case."""
    columns = list(columns)
    return [column for name in names for column in columns if column.lower() == name]


def choose_caption(texts: Sequence[str], columns: Sequence[str], wanted: str | None, where: str) -> str | None:
    """The caption column: the requested one, else the first of a usual name, else the only text column.

    Args:
        texts: the columns that hold texts.
        columns: all columns.

    Raises:
        UserError: the requested column is absent or holds no text.
    """
    key = "data.caption_column"
    if wanted is not None and wanted not in columns:
        raise UserError(
            f"{where} has no caption column '{wanted}': {nearest(wanted, columns)}", key=key, code="missing"
        )
    if wanted is not None and wanted not in texts:
        raise UserError(f"column '{wanted}' of {where} holds no text: {nearest(wanted, texts)}", key=key)
    if wanted is not None:
        return wanted
    usual = named(CAPTIONS, texts)
    free = [column for column in texts if column.lower() not in _NO_CAPTIONS]
    return usual[0] if usual else free[0] if len(free) == 1 else None


def left_out(columns: Iterable[str], label: str | None, caption: str | None, where: str) -> list[str]:
    """A notice for each column with the name of classes or captions where another kind of value lies in it.

    Args:
        columns: those that hold neither classes nor texts.
        label, caption: the columns that were chosen, if any.
    """
    columns = list(columns)
    lines = [] if label else [f"column '{c}' of {where} holds no classes: not read." for c in named(LABELS, columns)]
    if caption is None:
        lines += [f"column '{c}' of {where} holds no captions: not read." for c in named(CAPTIONS, columns)]
    return lines


def numbers_or_names(texts: Sequence[str]) -> list[object]:
    """Classes out of a text file: numbers where all that are not empty are written so, else the texts themselves."""
    written = [text for text in texts if text]
    if not written or not all(map(_NUMBER.fullmatch, written)):
        return list(texts)
    return [text and (int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else float(text)) for text in texts]


def class_numbers(
    values: Sequence[object],
    known: Iterable[object] = (),
    where: str = "the data",
    rows: Sequence[str] = (),
    names: tuple[str, ...] | None = None,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The number of each sample's class, and the names of the classes: the one rule for labels of all sources.

    Whole numbers from 0 up are the numbers themselves, so that a split that lacks a class does not shift the others
    (beyond 65535 they are numbered by size); truth values are the classes "false" and "true"; names come in
    alphabetical order, those that are written as numbers ("2", "10") first and by size.

    Args:
        values: the class of each sample.
        known: classes of other splits, to be numbered with them; what is no class among them is passed over.
        where: the data set, for messages.
        rows: what messages call each sample; default: its row.
        names: declared names of the classes 0, 1, ….

    Raises:
        UserError: a value is no class (a missing, negative, fractional or nested one), two kinds are mixed, or a
            number is beyond the declared names; the first such row is named.
    """

    def row(index: int) -> str:
        if index >= len(values):
            return "another split"
        return rows[index] if rows else f"row {index}"

    classes = [_class(value) for value in values]
    bad = next((index for index, value in enumerate(classes) if value is None), None)
    if bad is not None:
        shown = "an empty cell" if values[bad] is None or values[bad] == "" else repr(values[bad])
        raise UserError(
            f"{where}, {row(bad)}: {shown} is no class: give each image a whole number from 0 up or a name, or remove "
            "the labels.",
            key=where,
        )
    every = [value for value in (*classes, *map(_class, known)) if value is not None]
    for index, value in enumerate(every):
        if type(value) is not type(every[0]):
            raise UserError(
                f"{where}, {row(index)}: the class {value!r} is of another "
                f"kind than the first one, {every[0]!r}: write all classes in one way.",
                key=where,
                code="mismatch",
            )
        if names is not None and not (isinstance(value, int) and value < len(names)):
            raise UserError(
                f"{where}, {row(index)}: {value!r} is not among the {len(names)} declared classes.",
                key=where,
                code="mismatch",
            )
    return _numbered(every, len(values), names)


def _numbered(
    every: Sequence[bool | int | str], count: int, names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The numbers of the first `count` classes, all of one kind, and the names of all."""
    if names is None and every and isinstance(every[0], bool):
        names = ("false", "true")
    numbers = [value for value in every if isinstance(value, int)]  # truth values as well: 0 and 1
    if names is None and len(numbers) == len(every) and max(numbers, default=0) <= _LARGEST_NUMBER:
        names = tuple(map(str, range(max(numbers, default=-1) + 1)))
    if names is not None:
        return np.array(numbers[:count], dtype=np.int64), names
    ordered = sorted(set(every), key=_order)
    number_of = {value: number for number, value in enumerate(ordered)}
    return np.array([number_of[value] for value in every[:count]], dtype=np.int64), tuple(
        printable(str(value)) for value in ordered
    )


def _class(value: object) -> bool | int | str | None:
    """A truth value, a whole number from 0 up or a name that is not empty; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or (isinstance(value, int) and value >= 0) or (isinstance(value, str) and value.strip()):
        return value
    return None


def _order(value: object) -> tuple[int, int, str]:
    """Numbers and names of digits by size, then the other names in alphabetical order."""
    text = str(value)
    return (0, int(text), text) if text.isdecimal() and len(text) < 20 else (1, 0, text)
