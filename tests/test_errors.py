"""User errors carry a code and a key, also from one process to another."""

from __future__ import annotations

import pickle

import pytest

from carrara.errors import UserError, nearest
from tests.errors import refused


def test_code_and_key_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(UserError("steps is 0: give at least 1.", key="training.steps", code="invalid")))
    assert (str(error), error.key, error.code) == ("steps is 0: give at least 1.", "training.steps", "invalid")


def test_refused_looks_at_code_and_key() -> None:
    with refused("shape", key="start"):
        raise UserError("start is of another shape.", key="start", code="shape")
    with pytest.raises(AssertionError), refused("missing"):
        raise UserError("start is of another shape.", key="start", code="shape")


def test_the_nearest_word_is_named() -> None:
    assert nearest("dimm", ["ddim", "heun"]) == "did you mean 'ddim'?"
