"""Asserting that something is refused: by code and key, never by wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from carrara.errors import Code, UserError


@contextmanager
def refused(code: Code, key: str | None = None) -> Iterator[None]:
    """The body raises a `UserError` of this code, and of this key where one is given; its text is one sentence."""
    with pytest.raises(UserError) as caught:
        yield
    error = caught.value
    assert (error.code, error.key if key is not None else None) == (code, key), f"{error.code}, {error.key!r}: {error}"
    assert "\n" not in str(error).strip()
