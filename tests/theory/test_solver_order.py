"""Orders of convergence on the exact oracle (docs/math.md §5): the slope of log error against log step.

Grids are uniform in ℓ = ln(a/s) between interior times. The first interval is walked in many small steps, so that
the low-order start of a multistep method does not hide its order. The reference comes from another program, scipy's
eighth-order Runge-Kutta.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from carrara.process import Condition, GaussianMixture, Grid, Noise, Schedule, diffuse, grids, schedules
from carrara.solvers import PLMS, Adaptive, DPMSolver, Solver, solve
from tests.solvers.every import EVERY

MIXTURE = GaussianMixture(
    weights=[0.5, 0.3, 0.2],
    means=torch.tensor([[1.0, 0.4], [-0.8, 0.6], [0.1, -1.2]]),
    variances=[0.15, 0.25, 0.2],
)
TABLE = schedules.linear(1000)
NOISY, CLEAN = -1.5, 1.5  # ℓ at both ends
STEPS = (30, 60, 120, 240)


def start(schedule: Schedule) -> Tensor:
    t = float(schedule.time_at(2 * NOISY))
    eps = Noise(1).normal((16, 2), dtype=torch.float64)
    return diffuse(schedule, MIXTURE.sample(16, Noise(2)), t, eps)


def grid(schedule: Schedule, steps: int) -> Grid:
    """Uniform in ℓ, the first interval divided into so many steps that a first-order start is as small as a
    fourth-order method's error."""
    h = (CLEAN - NOISY) / steps
    places = np.concatenate([NOISY + h * np.linspace(0, 1, 2 * steps + 1)[:-1], np.linspace(NOISY + h, CLEAN, steps)])
    return grids.given(schedule, schedule.time_at(torch.from_numpy(2 * places)))


def reference(schedule: Schedule, x: Tensor) -> Tensor:
    """The flow in z = x/s: dz/dℓ = e^ℓ x̂_0."""
    denoiser = MIXTURE.denoiser(schedule)

    def slope(place: float, flat: np.ndarray) -> np.ndarray:
        t = float(schedule.time_at(2 * place))
        z = torch.from_numpy(flat).reshape(x.shape)
        x0 = denoiser(z * schedule.sigma(t), t, Condition()).x0
        result: np.ndarray = (math.exp(place) * x0).flatten().numpy()
        return result

    z = (x / schedule.sigma(schedule.time_at(2 * NOISY))).flatten().numpy()
    walked = solve_ivp(slope, (NOISY, CLEAN), z, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(walked.y[:, -1]).reshape(x.shape) * schedule.sigma(schedule.time_at(2 * CLEAN))


EXACT = reference(TABLE, start(TABLE))


def slope(solver: Solver) -> float:
    x, denoiser = start(TABLE), MIXTURE.denoiser(TABLE)
    errors = [float((solve(denoiser, TABLE, solver, grid(TABLE, n), x) - EXACT).abs().mean()) for n in STEPS]
    return -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


DETERMINISTIC = {name: make() for name, make in EVERY.items() if not make().stochastic}
SLOPES = {name: solver for name, solver in DETERMINISTIC.items() if not isinstance(solver, Adaptive)}


@pytest.mark.parametrize("solver", SLOPES.values(), ids=SLOPES.keys())
def test_order_of_convergence(solver: Solver) -> None:
    """Each solver has the order that it declares; a new one is found by its word or in `every.py`."""
    assert slope(solver) >= solver.convergence_order - 0.15


def test_published_third_order_is_second_order() -> None:
    """The printed second difference lacks a factor 2 (docs/math.md §5)."""
    assert slope(DPMSolver(order=3, published=True)) == pytest.approx(2, abs=0.15)


def test_plms_is_of_third_order_where_its_steps_are_even() -> None:
    """Even steps in s/a, so no fine start: what remains is the h³ of its own first two steps."""
    schedule = schedules.edm()
    x, denoiser = start(schedule), MIXTURE.denoiser(schedule)
    exact = reference(schedule, x)
    errors = []
    for n in STEPS:
        times = np.linspace(math.exp(-NOISY), math.exp(-CLEAN), n + 1)
        even = grids.given(schedule, times.tolist())
        errors.append(float((solve(denoiser, schedule, PLMS(), even, x) - exact).abs().mean()))
    assert -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0]) >= 3 - 0.15


@pytest.mark.parametrize("solver", DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
def test_every_schedule_walks_the_same_path(solver: Solver) -> None:
    """Only a/s matters: x/√(a² + s²) at equal ℓ is the same for tables, flow and EDM, so one order proof serves all.

    Adaptive chooses its sub-steps in flow variables, which all schedules share as well.
    """
    ends = []
    for schedule in (TABLE, schedules.rectified_flow(shift=2.0), schedules.edm(), schedules.vp_sde()):
        times = schedule.time_at(2 * torch.linspace(NOISY, CLEAN, 9, dtype=torch.float64))
        x = solve(MIXTURE.denoiser(schedule), schedule, solver, grids.given(schedule, times), start(schedule))
        ends.append(x / (schedule.alpha(times[-1]) ** 2 + schedule.sigma(times[-1]) ** 2).sqrt())
    for other in ends[1:]:
        # 1e-8: time_at and back costs some digits where the schedule is flat.
        torch.testing.assert_close(other, ends[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_adaptive_error_follows_its_tolerance(rtol: float) -> None:
    x, denoiser = start(TABLE), MIXTURE.denoiser(TABLE)
    pair = grids.given(TABLE, TABLE.time_at(torch.tensor([2 * NOISY, 2 * CLEAN])))
    found = solve(denoiser, TABLE, Adaptive(rtol=rtol, atol=rtol), pair, x)
    # Local errors of rtol·(1 + |z|) add up over the accepted sub-steps, a few dozen here.
    assert float((found - EXACT).abs().max()) < 30 * rtol
