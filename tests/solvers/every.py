"""Every solver under test: the words of `SOLVERS`, and options that have no word of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from carrara.solvers import (
    DDIM,
    DEIS,
    LMS,
    SOLVERS,
    Ancestral,
    DPMSolver,
    DPMSolver2S,
    Euler,
    Solver,
    UniPC,
)

OPTIONS: dict[str, Callable[[], Solver]] = {
    "ddpm large": partial(Ancestral, variance="large"),
    "ddim 0.5": partial(DDIM, eta=0.5),
    "ddim σ̂": partial(DDIM, eta=1.0, noise="large"),
    "euler churn": partial(Euler, churn=3.0, s_noise=1.01),
    "dpm++1": partial(DPMSolver, order=1),
    "dpm++1 heun": partial(DPMSolver, order=1, solver_type="heun"),
    "dpm++2m heun": partial(DPMSolver, solver_type="heun"),
    "dpm++3m published": partial(DPMSolver, order=3, published=True),
    "dpm++2s ancestral": partial(DPMSolver2S, eta=1.0),
    "unip1": partial(UniPC, order=1, corrector=False),
    "unip2": partial(UniPC, order=2, corrector=False),
    "unip2 B1": partial(UniPC, order=2, corrector=False, variant="B1"),
    "unip3": partial(UniPC, order=3, corrector=False),
    "unipc B1": partial(UniPC, variant="B1"),
    "unipc1 B1": partial(UniPC, order=1, variant="B1"),
    "deis2": partial(DEIS, order=2),
    "deis4": partial(DEIS, order=4),
    "lms3": partial(LMS, order=3),
    "lms2": partial(LMS, order=2),
}
EVERY: dict[str, Callable[[], Solver]] = {**SOLVERS, **OPTIONS}
