"""What the stochastic solvers draw, against exact recursions (docs/math.md §13)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from carrara.process import (
    Condition,
    GaussianMixture,
    GivenNoise,
    Grid,
    Noise,
    Prediction,
    Schedule,
    Transition,
    grids,
    schedules,
)
from carrara.process.schedules import Time
from carrara.solvers import DDIM, Ancestral, DPMSolver, DPMSolver2S, EulerAncestral, Heun, Solver, integrate, solve
from carrara.solvers.base import bound

MEAN, VARIANCE = 0.3, 0.04  # N(0.3, 0.04)
GAUSSIAN = GaussianMixture([1.0], torch.tensor([[MEAN]], dtype=torch.float64), [VARIANCE])


def chain(schedule: Schedule, grid: Grid, noise_variance: Callable[[Transition[float]], float]) -> tuple[float, float]:
    """Mean and variance at the end of x_s = c_x x_t + c_0 E[x_0|x_t] + √Σ z, all Gaussian, from N(0, s_T²).

    The coefficients are those of the direction √(s_s² - σ²) ε̂ with σ² = σ²_post: the posterior mean.
    """
    mean, variance = 0.0, float(schedule.sigma(float(grid.times[0]))) ** 2
    for t, s in grid.pairs():
        pair = Transition.of(schedule, t, s)
        gain = pair.alpha_t * VARIANCE / (pair.alpha_t**2 * VARIANCE + pair.sigma_t**2)  # Cov(x_0, x_t)/Var(x_t)
        slope = pair.x_coefficient + pair.x0_coefficient * gain
        mean = slope * mean + pair.x0_coefficient * (1 - gain * pair.alpha_t) * MEAN
        variance = slope**2 * variance + (0.0 if s == 0 else noise_variance(pair))
    return mean, variance


def small(pair: Transition[float]) -> float:
    return pair.posterior_variance


def large(pair: Transition[float]) -> float:
    return pair.variance


def optimal(pair: Transition[float]) -> float:
    inside = VARIANCE * pair.sigma_t**2 / (pair.alpha_t**2 * VARIANCE + pair.sigma_t**2)  # Var[x_0|x_t]
    return pair.posterior_variance + pair.x0_coefficient**2 * inside


@pytest.mark.parametrize(
    ("solver", "noise_variance"),
    [
        (Ancestral(variance="small"), small),
        (Ancestral(variance="large"), large),
        (Ancestral(variance="optimal"), optimal),
        (DDIM(eta=1.0), small),
        (DDIM(eta=1.0, noise="large"), large),
        (EulerAncestral(), small),
        (DPMSolver(order=1, eta=1.0), small),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_discrete_chain_of_a_gaussian(solver: Solver, noise_variance: Callable[[Transition[float]], float]) -> None:
    schedule, n = schedules.linear(1000), 200_000
    grid = grids.trailing(schedule, 10)
    x = Noise(1).normal((n, 1), dtype=torch.float64) * schedule.sigma(1000)
    found = solve(GAUSSIAN.denoiser(schedule), schedule, solver, grid, x, noise=Noise(1))
    mean, variance = chain(schedule, grid, noise_variance)
    # Four standard errors: a false alarm in 16,000 runs, and the seed is fixed.
    assert float(found.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(found.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize(("noise_variance", "bias"), [(small, -0.037), (large, 0.009)])
def test_a_thousand_steps_are_not_free_of_error(
    noise_variance: Callable[[Transition[float]], float], bias: float
) -> None:
    """docs/math.md §13: the variance of N(0, 0.04) sampled in 1,000 steps is off by -3.7 % and +0.9 %."""
    schedule = schedules.linear(1000)
    _, variance = chain(schedule, grids.trailing(schedule, 1000), noise_variance)
    assert variance / VARIANCE - 1 == pytest.approx(bias, abs=5e-4)


def response(solver: Solver, schedule: Schedule, grid: Grid) -> tuple[float, float]:
    """Mean and variance of a solver's end on the Gaussian, exactly: everything is affine in the normal numbers, so
    one row for each number, turned on alone, tells its coefficient."""
    count = len(grid) + 1
    on = torch.cat([torch.zeros(1, count, dtype=torch.float64), torch.eye(count, dtype=torch.float64)])
    draws = tuple(on[:, i : i + 1] for i in range(count))
    x = draws[0] * schedule.sigma(float(grid.times[0]))
    end = solve(GAUSSIAN.denoiser(schedule), schedule, solver, grid, x, noise=GivenNoise(tensors=draws)).flatten()
    return float(end[0]), float((end[1:] - end[0]).pow(2).sum())


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Ancestral(variance="small"), 1),
        (Ancestral(variance="large"), 1),
        (DDIM(eta=0.5), 1),
        (EulerAncestral(), 1),
        (DPMSolver(order=2, eta=1.0), 1),
        (DPMSolver(order=2, eta=1.0, solver_type="heun"), 1),
        (DPMSolver(order=3, eta=1.0), 1),
        (DPMSolver2S(eta=1.0), 1),
        (Heun(churn=20.0), 1),
    ],
    ids=str,
)
def test_the_variance_of_a_gaussian_converges(solver: Solver, order: int) -> None:
    """Without sampling error. The grid ends at an interior time, whose exact variance is a²v + s²."""
    schedule, steps = schedules.vp_sde(), (20, 40, 80)
    errors = []
    for n in steps:
        ends = torch.linspace(float(schedule.log_snr(1.0)), 4.0, n + 1, dtype=torch.float64)
        grid = grids.given(schedule, schedule.time_at(ends).clamp(max=1.0))
        last = float(grid.times[-1])
        exact = float(schedule.alpha(last)) ** 2 * VARIANCE + float(schedule.sigma(last)) ** 2
        errors.append(abs(response(solver, schedule, grid)[1] - exact))
    assert -float(np.polyfit(np.log(steps), np.log(errors), 1)[0]) >= order - 0.15


def test_the_optimal_variance_samples_a_gaussian_exactly_on_any_grid() -> None:
    """Σ* = σ²_post + (a_s σ²_{t|s}/s_t²)² Var[x_0|x_t] (Bao et al. 2022): at every interior time of five steps."""
    schedule = schedules.linear(1000)
    denoiser = GAUSSIAN.denoiser(schedule)
    times = [1000.0, 640.0, 500.0, 210.0, 30.0, 1.0]
    variance = float(schedule.alpha(1000)) ** 2 * VARIANCE + float(schedule.sigma(1000)) ** 2
    mean = float(schedule.alpha(1000)) * MEAN
    solver = Ancestral(variance="optimal")
    for t, s in itertools.pairwise(times):
        x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        z = GivenNoise(tensors=(torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64),))
        out = solver.step(bound(denoiser, Condition()), Transition.of(schedule, t, s), x, None, z).x.flatten()
        slope, spread = float(out[1] - out[0]), float(out[2] - out[0])
        mean, variance = float(out[0]) + slope * mean, slope**2 * variance + spread**2
        a, sigma = float(schedule.alpha(s)), float(schedule.sigma(s))
        assert mean == pytest.approx(a * MEAN, rel=1e-12)
        assert variance == pytest.approx(a**2 * VARIANCE + sigma**2, rel=1e-12)


MIXTURE = GaussianMixture([0.3, 0.7], torch.tensor([[-0.8], [0.5]]), [0.02, 0.05])


def density_after(solver: Solver, schedule: Schedule, grid: Grid, places: Tensor) -> Tensor:
    """The exact law of a one-dimensional chain at the grid's end, as probabilities of the cells at `places`.

    Every step is N(μ(x), Σ), both read off the solver itself, so the law is carried along by quadrature.
    """
    denoiser = MIXTURE.denoiser(schedule)
    x = places.reshape(-1, 1)
    first = float(grid.times[0])
    law = torch.exp(MIXTURE.log_prob(x, float(schedule.alpha(first)), float(schedule.sigma(first))))
    law = law / law.sum()
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    for t, s in grid.pairs():
        mean = solver.step(
            bound(denoiser, Condition()), Transition.of(schedule, t, s), x, None, GivenNoise(tensors=(zeros,))
        ).x
        moved = solver.step(
            bound(denoiser, Condition()), Transition.of(schedule, t, s), x, None, GivenNoise(tensors=(ones,))
        ).x
        spread = moved - mean
        kernel = torch.exp(-((places - mean) ** 2) / (2 * spread**2))
        law = law @ (kernel / kernel.sum(1, keepdim=True))
    return law


@pytest.mark.parametrize("solver", [Ancestral(variance="small"), Ancestral(variance="large"), DDIM(eta=0.7)], ids=str)
def test_the_bias_on_a_mixture_falls_as_one_over_the_steps(solver: Solver) -> None:
    """Total variation between the chain's law and the exact marginal, without any sampling error."""
    schedule = schedules.vp_sde()
    places = torch.linspace(-4, 4, 801, dtype=torch.float64)
    distances, steps = [], (10, 20, 40, 80)
    for n in steps:
        ends = torch.linspace(-4.0, 4.0, n + 1, dtype=torch.float64)  # log-SNR; s = 0.13 at the end, 13 cells wide
        grid = grids.given(schedule, schedule.time_at(ends))
        law = density_after(solver, schedule, grid, places)
        last = float(grid.times[-1])
        exact = torch.exp(
            MIXTURE.log_prob(places.reshape(-1, 1), float(schedule.alpha(last)), float(schedule.sigma(last)))
        )
        distances.append(0.5 * float((law - exact / exact.sum()).abs().sum()))
    assert -float(np.polyfit(np.log(steps), np.log(distances), 1)[0]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("make", [partial(schedules.linear, 1000), schedules.vp_sde, schedules.rectified_flow])
def test_ddim_inversion_returns_with_first_order(make: Callable[[], Schedule]) -> None:
    """From the clean image up and down again: the error falls as the step (docs/math.md §10)."""
    schedule = make()
    mixture = GaussianMixture([0.5, 0.5], torch.tensor([[0.6, -0.3], [-0.7, 0.2]]), [0.09, 0.04])
    denoiser, x0 = mixture.denoiser(schedule), mixture.sample(32, Noise(5))
    errors, steps = [], (50, 100, 200, 400)
    for n in steps:
        # Up to an ε-prediction's last time with signal, uniform in log-SNR.
        ends = torch.linspace(6.0, -6.0, n, dtype=torch.float64)
        grid = grids.given(schedule, [*schedule.time_at(ends).flip(0).tolist(), 0.0])
        noisy = solve(denoiser, schedule, DDIM(), grid.reversed(), x0)
        errors.append(float((solve(denoiser, schedule, DDIM(), grid, noisy) - x0).abs().mean()))
    assert -float(np.polyfit(np.log(steps), np.log(errors), 1)[0]) >= 1 - 0.15


def test_inversion_asks_at_the_later_time() -> None:
    """ε̂ is asked for the earlier image at the target time, never at the clean point."""
    schedule = schedules.linear(1000)
    grid = grids.trailing(schedule, 4)
    asked: list[float] = []
    exact = GAUSSIAN.denoiser(schedule)

    def listening(x: Tensor, t: Time, condition: Condition) -> Prediction:
        asked.append(float(t))
        return exact(x, t, condition)

    for step in integrate(listening, schedule, DDIM(), grid.reversed(), torch.zeros(1, 1)):
        assert step.time == asked[-1]
    assert asked == [250.0, 500.0, 750.0, 1000.0]
