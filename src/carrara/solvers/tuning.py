"""Grids found for a schedule and a solver by minimising the solver's own error where the answer is known.

In the spirit of Align Your Steps (Sabour et al. 2024), with the exact oracle in the place of a trained model: its
flow can be solved to many digits, so the error on a coarse grid is measured instead of bounded, in seconds.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from carrara.condition import Condition
from carrara.process import grids
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.oracle import GaussianMixture
from carrara.process.schedules import Schedule
from carrara.solvers.base import Solver, solve
from carrara.solvers.unipc import UniPC

_DIMENSIONS, _COMPONENTS = 64, 8
_SCALES = (0.4, 0.5, 0.6, 0.75, 0.9, 1.0)  # of the means, one for each class
_REFERENCE_STEPS = 400
_LONGEST, _SHORTEST = 3.0, -3.0  # bounds of the bends


def prior() -> GaussianMixture:
    """Six data sets in one mixture, one a label: 8 components in 64 dimensions each, means of standard
    deviation 0.4 to 1 (images in [-1, 1] have about 0.5), variances within a component from 0.005 to 0.15."""
    classes, noise = len(_SCALES), Noise(seed=20)
    count = classes * _COMPONENTS
    labels = torch.arange(count) // _COMPONENTS
    means = noise.normal((count, _DIMENSIONS), dtype=torch.float64) * torch.tensor(_SCALES)[labels].unsqueeze(1)
    low, high = math.log(0.005), math.log(0.15)
    variances = torch.exp(low + (high - low) * noise.uniform((count,), sub=1))
    return GaussianMixture(torch.ones(count), means, variances, labels)


def optimised_grid(
    schedule: Schedule,
    solver: Solver,
    steps: int,
    mixture: GaussianMixture | None = None,
    *,
    bends: int = 6,
    samples: int = 48,
    evaluations: int = 400,
) -> Grid:
    """The grid `grids.log_snr(schedule, steps, bends)` on which `solver` errs least on a mixture.

    The error is the geometric mean over samples of the root mean square distance, at the clean end, to the same
    sample integrated finely to `first_time`. Takes some seconds; keep the grid, or the bends in
    its name.

    Args:
        schedule, solver, steps: what the grid is for; the solver must be deterministic.
        mixture: the data in mind, `prior()` by default; each of its classes counts as a data set of its own.
        bends: how many numbers describe the grid (at most `steps - 1`).
        samples: how many samples are integrated, evenly over the classes.
        evaluations: how many grids are tried, each by walking all samples once.
    """
    from scipy.optimize import minimize

    data = mixture or prior()
    denoiser = data.denoiser(schedule)
    condition = Condition(label=torch.arange(samples) % data.classes)
    start = Noise(seed=21).normal((samples, *data.shape), dtype=torch.float64) * schedule.sigma(schedule.final_time)
    fine = solve(denoiser, schedule, UniPC(order=3), grids.log_snr(schedule, _REFERENCE_STEPS), start, condition)

    def error(values: np.ndarray) -> float:
        found = solve(denoiser, schedule, solver, grids.log_snr(schedule, steps, values.tolist()), start, condition)
        distances = (found - fine).flatten(1).pow(2).mean(1).sqrt().clamp(min=1e-14)
        return min(float(distances.log().mean()), 0.0)  # a path that errs by 1 or more is as bad as any

    count = max(min(bends, steps - 1), 2)
    with torch.no_grad():
        best = minimize(
            error,
            np.zeros(count),
            method="Powell",  # the error has kinks, where one class takes over from another: no gradients
            bounds=[(_SHORTEST, _LONGEST)] * count,
            options={"maxfev": evaluations},
        ).x
    return grids.log_snr(schedule, steps, np.round(best - best.mean(), 3).tolist())
