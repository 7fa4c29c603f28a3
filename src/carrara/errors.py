"""Mistakes that the user can fix, each explained in one sentence.

The command line prints the sentence of a `UserError` and exits with code 2, without a traceback. Tests and the server
read its `code` and `key`; the wording is free to improve.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import Literal

Code = Literal[
    "missing",  # a file, key or input that is needed is not there
    "unknown",  # a word or key that is not one of the known ones; the nearest is named
    "invalid",  # a value of the wrong type or out of range
    "shape",  # a size that does not fit
    "mismatch",  # two things that must agree do not (labels and classes, a run and its codec)
    "conflict",  # options or files that exclude each other
    "unsupported",  # known, but not possible here
    "damaged",  # a file that is cut short or corrupt, or weights that are not finite
    "exists",  # something would be overwritten
    "not_finite",  # a computation gave NaN or infinity
    "busy",  # locked by another process
    "newer",  # written by a newer version
    "resources",  # memory or disk is not enough
]


class UserError(ValueError):
    """A mistake in the input. Its text is one sentence that names the file or key and says what to do.

    Args:
        message: the sentence.
        key: what is wrong: the argument, recipe key ("training.steps"), option or file, where there is one.
        code: the kind of mistake.
    """

    def __init__(self, message: str, *, key: str = "", code: Code = "invalid") -> None:
        super().__init__(message)
        self.key = key
        self.code: Code = code


def nearest(word: str, known: Iterable[str]) -> str:
    """The ending of an error sentence about an unknown word: the nearest known one, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are: {', '.join(known)}."


def whole_number(value: object, key: str, least: int | None = None) -> int:
    """A whole number of any integer type (numpy's and 0-d tensors' too).

    Raises:
        UserError: text, a fraction, or less than `least`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{key} is {value!r}: it must be a whole number.", key=key) from None
    if least is not None and number < least:
        raise UserError(f"{key} is {number}: it must be at least {least}.", key=key)
    return number
