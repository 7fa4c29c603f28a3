"""Solvers: one pure step each, for the one loop `integrate`. One family a file."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from carrara.errors import UserError, nearest
from carrara.solvers.adaptive import Adaptive
from carrara.solvers.ancestral import Ancestral
from carrara.solvers.base import NonFinite, Solver, Step, integrate, solve
from carrara.solvers.ddim import DDIM
from carrara.solvers.dpm_solver import DPMSolver, DPMSolver2S
from carrara.solvers.euler import Euler, EulerAncestral
from carrara.solvers.heun import Heun
from carrara.solvers.multistep import DEIS, LMS, PLMS
from carrara.solvers.parallel import Picard, integrate_parallel, solve_parallel
from carrara.solvers.spacing import SPACINGS, WORDS, grid_of
from carrara.solvers.tuning import optimised_grid
from carrara.solvers.unipc import UniPC

SOLVERS: dict[str, Callable[[], Solver]] = {
    "ddpm": Ancestral,
    "ddim": DDIM,
    "euler": Euler,
    "euler-ancestral": EulerAncestral,
    "heun": Heun,
    "heun-sde": partial(Heun, churn=40, s_min=0.05, s_max=50, s_noise=1.003),
    "dpm++2m": DPMSolver,
    "dpm++3m": partial(DPMSolver, order=3),
    "dpm++2s": DPMSolver2S,
    "dpm++2m-sde": partial(DPMSolver, eta=1.0),
    "dpm++3m-sde": partial(DPMSolver, order=3, eta=1.0),
    "unipc": UniPC,
    "unipc1": partial(UniPC, order=1),
    "unipc3": partial(UniPC, order=3),
    "deis": DEIS,
    "lms": LMS,
    "plms": PLMS,
    "adaptive": Adaptive,
}
"""The words of the command line and of recipes; the tests of contract and order read all of them."""


def _plain(name: str) -> str:
    """The word without what people spell differently: "DPM++ 2M SDE", "dpmpp_2m_sde", "Euler a"."""
    word = "".join(c for c in name.lower() if c.isalnum() or c == "+").replace("dpmpp", "dpm++")
    return {"eulera": "eulerancestral", "pndm": "plms"}.get(word, word)


def named(name: str) -> Solver:
    """The solver behind a word; case, spaces, hyphens and underscores do not matter.

    Raises:
        UserError: an unknown word; the nearest known one is named.
    """
    for word, make in SOLVERS.items():
        if _plain(word) == _plain(name):
            return make()
    raise UserError(f"there is no solver '{name}': {nearest(name, SOLVERS)}", key="solver", code="unknown")


def resolve(choice: str | Solver, eta: float | None = None) -> Solver:
    """The solver that was chosen, by a word or as it is, with another η where one is given.

    Raises:
        UserError: an unknown word, or an η for a solver that has none.
    """
    solver = named(choice) if isinstance(choice, str) else choice
    if eta is None:
        return solver
    if "eta" not in getattr(solver, "__dataclass_fields__", {}):
        known = [word for word, make in SOLVERS.items() if "eta" in getattr(make(), "__dataclass_fields__", {})]
        raise UserError(
            f"the solver {choice} has no eta: leave it out, or take one of {', '.join(known)}.",
            key="eta",
            code="conflict",
        )
    own: Any = solver
    changed: Solver = replace(own, eta=eta)
    return changed


__all__ = [
    "DDIM",
    "DEIS",
    "LMS",
    "PLMS",
    "SOLVERS",
    "SPACINGS",
    "WORDS",
    "Adaptive",
    "Ancestral",
    "DPMSolver",
    "DPMSolver2S",
    "Euler",
    "EulerAncestral",
    "Heun",
    "NonFinite",
    "Picard",
    "Solver",
    "Step",
    "UniPC",
    "grid_of",
    "integrate",
    "integrate_parallel",
    "named",
    "optimised_grid",
    "resolve",
    "solve",
    "solve_parallel",
]
