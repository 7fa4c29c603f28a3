"""Mistakes that the user can mend, each told in one sentence.

The command line prints the sentence of a `UserError` and exits with code 2, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input. Its text is one sentence that names the file or key and says what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The ending of an error sentence about an unknown word: the nearest known one, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are: {', '.join(known)}."
