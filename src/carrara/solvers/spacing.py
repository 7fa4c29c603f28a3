"""The grid behind a word; those that are optimised for a solver are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from carrara.errors import UserError, nearest, whole_number
from carrara.files import write_whole
from carrara.process import grids
from carrara.process.grids import Grid
from carrara.process.schedules import Schedule
from carrara.solvers.base import Solver
from carrara.solvers.tuning import optimised_grid

SPACINGS: dict[str, Callable[[Schedule, int], Grid]] = {
    "trailing": grids.trailing,
    "leading": grids.leading,
    "linspace": grids.linspace,
    "quadratic": grids.quadratic,
    "karras": grids.karras,
    "log_snr": grids.log_snr,
}
OPTIMISED = "optimised"
WORDS = (*SPACINGS, OPTIMISED)
"""The words of the command line and of recipes."""

_VERSION = 1
"""Of `optimised_grid`: another one finds other grids."""


def grid_of(choice: str | Grid, schedule: Schedule, steps: int, solver: Solver) -> Grid:
    """The times of a sampling run.

    Args:
        choice: a word of `WORDS`, or a grid as it is.
        steps: pairs of the grid, 1..T; a grid as it is has its own.
        solver: what an optimised grid is for.

    Raises:
        UserError: an unknown word, steps outside 1..T, a grid that leaves the schedule, or an optimised one for a
            solver that draws noise.
    """
    if isinstance(choice, Grid):
        schedule.check(choice.times)
        return choice
    if choice == OPTIMISED:
        return optimised(schedule, solver, steps)
    if choice not in SPACINGS:
        raise UserError(f"there is no spacing '{choice}': {nearest(choice, WORDS)}", key="grid", code="unknown")
    return SPACINGS[choice](schedule, steps)


def optimised(schedule: Schedule, solver: Solver, steps: int) -> Grid:
    """`optimised_grid`, read from the cache where it was found before; finding one takes some seconds.

    Raises:
        UserError: a solver that draws noise, or steps outside 1..T.
    """
    if solver.stochastic:
        raise UserError(
            f"a grid is optimised for a solver without noise, {solver!r} draws some: take another spacing.",
            key="grid",
            code="conflict",
        )
    grids.trailing(schedule, steps)  # too many steps are refused at once
    steps = whole_number(steps, "steps", least=1)
    key = json.dumps([_VERSION, schedule.spec, repr(solver), steps], sort_keys=True)
    path = cache_folder() / "grids" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    grid = _read(path, key, schedule, steps)
    if grid is None:
        times = optimised_grid(schedule, solver, steps).times.tolist()
        grid = _grid(times)
        with suppress(UserError):  # a cache that cannot be written only costs the time again
            write_whole(path, json.dumps({"for": key, "times": times}).encode())
    return grid


def cache_folder() -> Path:
    """$CARRARA_CACHE, or `carrara` in the user's cache folder."""
    own = os.environ.get("CARRARA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carrara"


def _grid(times: list[float]) -> Grid:
    return Grid(torch.tensor(times, dtype=torch.float64), OPTIMISED)


def _read(path: Path, key: str, schedule: Schedule, steps: int) -> Grid | None:
    """The grid in a file of the cache; None where there is none, or one that is damaged or does not fit."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["for"] == key:
            grid = _grid([float(time) for time in found["times"]])
            schedule.alpha(schedule.check(grid.times))
            return grid if len(grid) == steps else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a `UserError` is a ValueError
        pass
    return None
