"""Solvers by a word or as they are, with an η where they have one."""

from __future__ import annotations

from typing import Any

import pytest

from carrara.solvers import DDIM, DPMSolver, EulerAncestral, UniPC, resolve
from tests.errors import refused


@pytest.mark.parametrize("choice", ["ddim", "DDIM", DDIM(), DDIM(eta=1.0)])
def test_any_spelling_takes_an_eta(choice: Any) -> None:
    assert resolve(choice, 0.5) == DDIM(eta=0.5)


def test_every_solver_with_an_eta_takes_one() -> None:
    assert resolve("euler-ancestral", 0.5) == EulerAncestral(eta=0.5)
    assert resolve("dpm++2m", 0.5) == DPMSolver(eta=0.5)
    assert resolve("unipc") == UniPC()


@pytest.mark.parametrize("choice", ["unipc", "heun", UniPC()])
def test_the_others_refuse_it(choice: Any) -> None:
    with refused("conflict", "eta"):
        resolve(choice, 0.5)


def test_an_unknown_word_is_named() -> None:
    with refused("unknown", "solver"):
        resolve("dimm")
