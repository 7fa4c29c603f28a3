"""Methods that are one and the same under two names, for any schedule and any grid."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carrara.process import Condition, Denoiser, GaussianMixture, Grid, Noise, Prediction, Schedule, grids, schedules
from carrara.process.schedules import Time
from carrara.process.transitions import Transition
from carrara.solvers import (
    DDIM,
    DEIS,
    LMS,
    SOLVERS,
    Ancestral,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Picard,
    Solver,
    Step,
    UniPC,
    integrate,
    integrate_parallel,
    solve,
    solve_parallel,
)
from carrara.solvers.base import bound

MIXTURE = GaussianMixture([0.6, 0.4], torch.tensor([[0.7, -0.2, 0.1], [-0.5, 0.4, 0.3]]), [0.1, 0.05])
SCHEDULES: list[Schedule] = [
    schedules.linear(1000),
    schedules.zero_terminal_snr(schedules.scaled_linear(1000)),
    schedules.cosine(200),
    schedules.vp_sde(),
    schedules.edm(),
    schedules.rectified_flow(shift=3.0),
]
# Different orders of the same arithmetic, in float64, amplified by 1/a ≤ 200 at the noisy end.
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@st.composite
def walks(draw: st.DrawFn) -> tuple[Schedule, Grid]:
    """A schedule and any descending times of it, to the clean point or not."""
    schedule = draw(st.sampled_from(SCHEDULES))
    count = draw(st.integers(2, 8))
    if schedule.discrete:
        whole = st.integers(1, int(schedule.final_time))
        times = [float(t) for t in draw(st.lists(whole, min_size=count, max_size=count, unique=True))]
    else:
        shares = draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count, unique=True))
        times = [schedule.first_time + (schedule.final_time - schedule.first_time) * i / 1000 for i in shares]
    if draw(st.booleans()):
        times.append(0.0)
    return schedule, grids.given(schedule, sorted(times, reverse=True))


def walk(schedule: Schedule, grid: Grid, solver: Solver) -> Tensor:
    noise = Noise(seed=4)
    x = noise.normal((3, 3), dtype=torch.float64) * float(schedule.sigma(float(grid.times[0])))
    return solve(MIXTURE.denoiser(schedule), schedule, solver, grid, x, noise=noise)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Euler(), DDIM()),
        (DPMSolver(order=1), DDIM()),
        (LMS(order=1), DDIM()),
        (DEIS(order=1), DDIM()),
        (UniPC(order=1, corrector=False), DDIM()),
        (EulerAncestral(), DDIM(eta=1.0)),
        (EulerAncestral(eta=0.3), DDIM(eta=0.3)),
        (Ancestral(variance="small"), DDIM(eta=1.0)),
        (DPMSolver(order=1, eta=1.0), DDIM(eta=1.0)),
        (UniPC(order=2, corrector=False), DPMSolver(order=2)),
        (Heun(churn=0.0), Heun(churn=5.0, s_min=1e9)),
    ],
    ids=lambda solver: str(solver),
)
@given(walk_of=walks())
@settings(max_examples=25, deadline=None)
def test_two_names_for_one_method(one: Solver, other: Solver, walk_of: tuple[Schedule, Grid]) -> None:
    close(walk(*walk_of, one), walk(*walk_of, other))


@given(walk_of=walks())
@settings(max_examples=25, deadline=None)
def test_unip3_is_the_corrected_third_order_multistep(walk_of: tuple[Schedule, Grid]) -> None:
    """Both integrate the parabola through the last three predictions exactly, once they have three.

    Wild grids let the parabola overshoot, which amplifies rounding: compared relative to the larger values.
    """
    one = walk(*walk_of, UniPC(order=3, corrector=False))
    other = walk(*walk_of, DPMSolver(order=3))
    assert float((one - other).abs().max()) <= 1e-7 * (1 + float(other.abs().max()))


@given(walk_of=walks(), eta=st.sampled_from([0.0, 0.4, 1.0]), window=st.sampled_from([None, 1, 2, 5]))
@settings(max_examples=40, deadline=None)
def test_picard_without_tolerance_is_sequential_ddim(
    walk_of: tuple[Schedule, Grid], eta: float, window: int | None
) -> None:
    schedule, grid = walk_of
    noise = Noise(seed=4)
    x = noise.normal((3, 3), dtype=torch.float64) * float(schedule.sigma(float(grid.times[0])))
    method = Picard(eta=eta, window=window, tolerance=0.0)
    found = solve_parallel(MIXTURE.denoiser(schedule), schedule, method, grid, x, noise=noise)
    close(found, walk(schedule, grid, DDIM(eta=eta)))


def test_picard_needs_fewer_sweeps_than_steps() -> None:
    schedule = schedules.linear(1000)
    denoiser, grid = MIXTURE.denoiser(schedule), grids.trailing(schedule, 100)
    x = Noise(1).normal((4, 3), dtype=torch.float64)
    steps = list(integrate_parallel(denoiser, schedule, Picard(tolerance=1e-4), grid, x))
    assert len(steps) < 25
    assert [step.index for step in steps] == sorted({step.index for step in steps})
    assert (steps[-1].index, steps[-1].time, steps[-1].total) == (99, 0.0, 100)
    exact = solve(denoiser, schedule, DDIM(), grid, x)
    # A point is left alone once it moves by 1e-4 of its noise level; a hundred such changes may add up.
    torch.testing.assert_close(steps[-1].x, exact, rtol=0, atol=1e-2)


def test_an_order_above_the_steps_falls_back() -> None:
    """With two predictions there is a line, with one a constant, whatever order was asked for."""
    schedule = schedules.linear(1000)
    two = grids.given(schedule, [900.0, 600.0, 300.0])
    torch.testing.assert_close(
        walk(schedule, two, DPMSolver(order=3)),
        walk(schedule, two, DPMSolver(order=2)),
    )
    close(walk(schedule, two, UniPC(order=3)), walk(schedule, two, UniPC(order=2)))
    close(walk(schedule, two, LMS(order=4)), walk(schedule, two, LMS(order=2)))
    one = grids.given(schedule, [900.0, 600.0])
    for name in ("dpm++2m", "dpm++3m", "unipc", "unipc3", "lms"):
        close(walk(schedule, one, SOLVERS[name]()), walk(schedule, one, DDIM()))


def pulled(denoiser: Denoiser, folded: bool) -> Denoiser:
    """A denoiser with a gradient that pulls toward 1, folded in already or left pending."""

    def call(x: Tensor, t: Time, condition: Condition) -> Prediction:
        prediction = denoiser(x, t, condition)
        pending = Prediction(
            x, prediction.alpha, prediction.sigma, prediction.x0, prediction.eps, pending=0.5 * (1 - x)
        )
        return pending.folded() if folded else pending

    return call


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ddpm"])
def test_every_solver_folds_pending_guidance(name: str) -> None:
    schedule = schedules.linear(1000)
    grid = grids.trailing(schedule, 6)
    x = Noise(3).normal((2, 3), dtype=torch.float64)
    ends = [
        solve(pulled(MIXTURE.denoiser(schedule), folded), schedule, SOLVERS[name](), grid, x)
        for folded in (False, True)
    ]
    assert torch.equal(*ends)
    plain = solve(MIXTURE.denoiser(schedule), schedule, SOLVERS[name](), grid, x)
    assert not torch.allclose(ends[0], plain, atol=1e-3)


def test_picard_folds_pending_guidance() -> None:
    schedule = schedules.linear(1000)
    grid = grids.trailing(schedule, 6)
    x = Noise(3).normal((2, 3), dtype=torch.float64)
    ends = [
        solve_parallel(pulled(MIXTURE.denoiser(schedule), folded), schedule, Picard(), grid, x)
        for folded in (False, True)
    ]
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_after_step_puts_in_is_what_goes_on(name: str) -> None:
    """A step may be replaced (inpainting), and no solver goes back behind it: from the same x, history and
    noise, the next step is affine in x with the step's own slope, so a shift of x shows undiminished by history."""
    schedule = schedules.linear(1000)
    grid = grids.trailing(schedule, 6)
    denoiser = MIXTURE.denoiser(schedule)
    x = Noise(3).normal((2, 3), dtype=torch.float64)

    def shifted(step: Step) -> Tensor:
        return step.x + 0.25 if step.index == 2 else step.x

    steps = list(integrate(denoiser, schedule, SOLVERS[name](), grid, x, after_step=shifted))
    t, s = grid.pairs()[3]
    alone = SOLVERS[name]().step(
        bound(denoiser, Condition()), Transition.of(schedule, t, s), steps[2].x, steps[2].state, Noise().at(4)
    )
    assert torch.equal(alone.x, steps[3].x)
    plain = list(integrate(denoiser, schedule, SOLVERS[name](), grid, x))
    assert torch.equal(plain[1].x, steps[1].x)
    assert float((plain[3].x - steps[3].x).abs().min()) > 0.01
