"""Solvers: one pure step each, walked by the one `integrate`. One family a file."""

from collections.abc import Callable

from carrara.errors import UserError, nearest
from carrara.solvers.ancestral import Ancestral
from carrara.solvers.base import NonFinite, Solver, Step, integrate, solve
from carrara.solvers.ddim import DDIM
from carrara.solvers.dpm_solver import DPMSolver

SOLVERS: dict[str, Callable[[], Solver]] = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "dpm++2m": DPMSolver,
}
"""The words of the command line and of recipes; the contract tests walk all of them."""


def named(name: str) -> Solver:
    """The solver behind a word.

    Raises:
        UserError: an unknown word; the nearest known one is named.
    """
    if name not in SOLVERS:
        raise UserError(f"there is no solver '{name}': {nearest(name, SOLVERS)}")
    return SOLVERS[name]()


__all__ = ["DDIM", "SOLVERS", "Ancestral", "DPMSolver", "NonFinite", "Solver", "Step", "integrate", "named", "solve"]
