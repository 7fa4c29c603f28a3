"""What every solver promises, on every kind of schedule, for every form of prediction.

A new word in `SOLVERS` is picked up by itself; options that have no word of their own are listed here.
"""

from __future__ import annotations

import io
from typing import get_args

import pytest
import torch
from torch import Tensor

from carrara.process import Condition, NetworkDenoiser, Noise, Predicts, Schedule, grids, schedules
from carrara.process.transitions import Transition
from carrara.solvers import (
    Adaptive,
    DPMSolver2S,
    Euler,
    integrate,
    solve,
)
from carrara.solvers.base import bound
from tests.errors import refused
from tests.solvers.every import EVERY

SCHEDULES: dict[str, Schedule] = {
    "table": schedules.linear(40),
    "zero snr": schedules.zero_terminal_snr(schedules.scaled_linear(40)),
    "vp sde": schedules.vp_sde(),
    "edm": schedules.edm(),
    "flow": schedules.rectified_flow(shift=3.0),
}
SHAPE = (3, 1, 2, 2)
ASKS_BETWEEN = (DPMSolver2S, Adaptive, Euler)  # these ask at times of their own choosing


def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """A small smooth network: every sample on its own, told the time."""
    phase = torch.sin(time.clamp(-20, 1e4) / 7).reshape(-1, *[1] * (x.ndim - 1)).to(x)
    scaled = x * (0.7 + 0.2 * phase)
    return 0.3 * scaled / (1 + scaled**2).sqrt() + 0.1 * phase


def previous(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The same, for a network that tells the mean of x_{t-1}: near x itself."""
    return 0.9 * x + 0.1 * network(x, time, condition)


def cases() -> list[tuple[str, str, Predicts]]:
    every: list[tuple[str, str, Predicts]] = []
    for name in EVERY:
        for kind, schedule in SCHEDULES.items():
            for predicts in get_args(Predicts):
                if predicts == "eps" and float(schedule.alpha(schedule.final_time)) == 0:
                    continue  # refused: see below
                if predicts == "previous" and (not schedule.discrete or isinstance(EVERY[name](), ASKS_BETWEEN)):
                    continue  # such a network knows a table's own times only
                every.append((name, kind, predicts))
    return every


@pytest.mark.parametrize(("name", "kind", "predicts"), cases())
def test_contract(name: str, kind: str, predicts: Predicts) -> None:
    schedule, solver = SCHEDULES[kind], EVERY[name]()
    denoiser = NetworkDenoiser(previous if predicts == "previous" else network, schedule, predicts)
    grid = grids.linspace(schedule, 5)
    noise = Noise(seed=3)
    x = noise.normal(SHAPE, dtype=torch.float64) * float(schedule.sigma(schedule.final_time))
    before = x.clone()

    steps = list(integrate(denoiser, schedule, solver, grid, x, noise=noise))
    seen = [step.x.clone() for step in steps]
    again = list(integrate(denoiser, schedule, solver, grid, x, noise=noise))

    assert [step.time for step in steps] == grid.times[1:].tolist(), "arrives at the grid's times"
    assert all(torch.isfinite(step.x).all() for step in steps)
    assert torch.equal(x, before), "the start is not changed"
    assert all(torch.equal(step.x, y) for step, y in zip(steps, seen, strict=True)), "nor is anything yielded"
    assert all(torch.equal(step.x, y.x) for step, y in zip(steps, again, strict=True)), "the same twice"

    x0 = seen[-1]
    for row in range(len(x)):
        alone = solve(denoiser, schedule, solver, grid, x[row : row + 1], noise=noise.rows([row]))
        # Elementwise arithmetic may be vectorised otherwise for another size: a few last bits.
        torch.testing.assert_close(alone, x0[row : row + 1], rtol=1e-10, atol=1e-12)

    for dtype in (torch.float32, torch.float64):
        step = next(integrate(denoiser, schedule, solver, grid, x.to(dtype), noise=noise))
        assert (step.x.dtype, step.x.device, step.x.shape) == (dtype, x.device, x.shape)

    resumed = _through_a_file(steps[2].checkpoint())
    rest = list(integrate(denoiser, schedule, solver, grid, torch.zeros_like(x), noise=noise, resume=resumed))
    assert [step.index for step in rest] == [3, 4]
    assert torch.equal(rest[-1].x, x0), "resumed in the middle: the same bits"

    one = solve(denoiser, schedule, solver, grids.trailing(schedule, 1), x, noise=noise)
    assert bool(torch.isfinite(one).all()), "one step"

    with torch.no_grad():
        assert torch.equal(solve(denoiser, schedule, solver, grid, x, noise=noise), x0)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(solve(denoiser, schedule, solver, grid, leaf, noise=noise).sum(), leaf)
    assert bool(torch.isfinite(gradient).all()), "differentiable"
    assert bool((gradient != 0).any())


def _through_a_file(checkpoint: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", EVERY)
def test_noise_is_addressed_so_that_a_step_can_be_taken_alone(name: str) -> None:
    schedule, solver = SCHEDULES["table"], EVERY[name]()
    denoiser = NetworkDenoiser(network, schedule)
    grid = grids.linspace(schedule, 4)
    noise = Noise(seed=5)
    x = noise.normal(SHAPE, dtype=torch.float64)
    first, second, *_ = integrate(denoiser, schedule, solver, grid, x, noise=noise)
    t, s = grid.pairs()[1]
    alone = solver.step(bound(denoiser, Condition()), Transition.of(schedule, t, s), first.x, first.state, noise.at(2))
    assert torch.equal(alone.x, second.x)


@pytest.mark.parametrize("name", EVERY)
def test_eps_prediction_at_zero_snr_is_refused(name: str) -> None:
    schedule = SCHEDULES["zero snr"]
    denoiser = NetworkDenoiser(network, schedule, "eps")
    x = Noise(0).normal(SHAPE)
    with refused("unsupported", "predicts"):
        solve(denoiser, schedule, EVERY[name](), grids.trailing(schedule, 4), x)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "adaptive"])  # which walks on inside the pair
def test_from_zero_snr_the_first_step_is_of_first_order(name: str) -> None:
    """There x is pure noise and the step is a_s x̂_0 + (noise of level s), whatever the method."""
    schedule, solver = SCHEDULES["zero snr"], EVERY[name]()
    denoiser = NetworkDenoiser(network, schedule, "v")
    grid = grids.trailing(schedule, 4)
    noise = Noise(1)
    x = noise.normal(SHAPE, dtype=torch.float64)
    step = next(integrate(denoiser, schedule, solver, grid, x, noise=noise))
    a, s = float(schedule.alpha(step.time)), float(schedule.sigma(step.time))
    rest = step.x - a * step.prediction.x0
    # What is left is either the old noise, or new noise, or a mixture of both with total variance s².
    old, new = step.prediction.eps, noise.at(1).like(x)
    mixed = torch.stack([old.flatten(), new.flatten()], dim=1)
    weights = torch.linalg.lstsq(mixed, rest.flatten().unsqueeze(1)).solution
    torch.testing.assert_close(mixed @ weights, rest.flatten().unsqueeze(1), rtol=1e-9, atol=1e-9)
    if name not in ("ddim σ̂", "ddpm large"):  # whose variance is larger on purpose
        assert float(weights.norm()) == pytest.approx(s, rel=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_into_the_clean_point_x_is_the_prediction(name: str) -> None:
    schedule, solver = SCHEDULES["table"], EVERY[name]()
    denoiser = NetworkDenoiser(network, schedule)
    grid = grids.linspace(schedule, 4)
    *_, last = integrate(denoiser, schedule, solver, grid, Noise(2).normal(SHAPE, dtype=torch.float64), noise=Noise(2))
    torch.testing.assert_close(last.x, last.prediction.x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "ddim"])
def test_only_deterministic_ddim_inverts(name: str) -> None:
    schedule = SCHEDULES["table"]
    denoiser = NetworkDenoiser(network, schedule)
    with refused("unsupported", "solver"):
        solve(denoiser, schedule, EVERY[name](), grids.linspace(schedule, 4).reversed(), torch.zeros(SHAPE))
