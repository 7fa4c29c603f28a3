"""The promises of every solver, one test each, on every kind of schedule and for every form of prediction.

A new word in `SOLVERS` is picked up by itself; options that have no word of their own are listed here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from carrara.process import Condition, NetworkDenoiser, Noise, Predicts, Schedule, grids, schedules
from carrara.process.grids import Grid
from carrara.process.transitions import Transition
from carrara.solvers import Adaptive, DPMSolver2S, Euler, Solver, Step, integrate, solve
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
NOISE = Noise(seed=3)
BETWEEN = (DPMSolver2S, Adaptive, Euler)
"""These evaluate the network between the grid's times, too."""


def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """A small smooth network: every sample on its own, given the time."""
    phase = torch.sin(time.clamp(-20, 1e4) / 7).reshape(-1, *[1] * (x.ndim - 1)).to(x)
    scaled = x * (0.7 + 0.2 * phase)
    return 0.3 * scaled / (1 + scaled**2).sqrt() + 0.1 * phase


def previous(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The same, for a network that predicts the mean of x_{t-1}: near x itself."""
    return 0.9 * x + 0.1 * network(x, time, condition)


@dataclass(frozen=True)
class Run:
    """Five steps of a solver on one kind of schedule with one form of prediction, and what they were made from."""

    label: str
    schedule: Schedule
    solver: Solver
    denoiser: NetworkDenoiser
    grid: Grid
    x: Tensor
    steps: tuple[Step, ...]

    def solve(self, x: Tensor, noise: Noise = NOISE, steps: int | None = None) -> Tensor:
        """x_0 from another x; on another grid of so many steps where a number is given."""
        grid = self.grid if steps is None else grids.trailing(self.schedule, steps)
        return solve(self.denoiser, self.schedule, self.solver, grid, x, noise=noise)

    def integrate(self, x: Tensor, resume: dict[str, Any] | None = None) -> Iterator[Step]:
        return integrate(self.denoiser, self.schedule, self.solver, self.grid, x, noise=NOISE, resume=resume)

    @property
    def x0(self) -> Tensor:
        return self.steps[-1].x


@cache
def runs(name: str) -> list[Run]:
    """A solver's run on every kind of schedule, for every form of prediction that it allows."""
    return [
        _run(name, kind, predicts)
        for kind, schedule in SCHEDULES.items()
        for predicts in get_args(Predicts)
        # ε at zero SNR is refused, see below; such networks know a table's own times only.
        if not (predicts == "eps" and float(schedule.alpha(schedule.final_time)) == 0)
        and not (predicts == "previous" and (not schedule.discrete or isinstance(EVERY[name](), BETWEEN)))
    ]


def _run(name: str, kind: str, predicts: Predicts) -> Run:
    schedule, solver = SCHEDULES[kind], EVERY[name]()
    denoiser = NetworkDenoiser(previous if predicts == "previous" else network, schedule, predicts)
    grid = grids.linspace(schedule, 5)
    x = NOISE.normal(SHAPE, dtype=torch.float64) * float(schedule.sigma(schedule.final_time))
    steps = tuple(integrate(denoiser, schedule, solver, grid, x, noise=NOISE))
    return Run(f"{name}, {kind}, {predicts}", schedule, solver, denoiser, grid, x, steps)


every_solver = pytest.mark.parametrize("name", EVERY)


@every_solver
def test_steps_are_finite_and_end_at_the_grids_times(name: str) -> None:
    for run in runs(name):
        assert [step.time for step in run.steps] == run.grid.times[1:].tolist(), run.label
        assert all(bool(torch.isfinite(step.x).all()) for step in run.steps), run.label


@every_solver
def test_neither_the_start_nor_a_yielded_step_is_changed(name: str) -> None:
    for run in runs(name):
        x = run.x.clone()
        seen = [(step.x, step.x.clone()) for step in run.integrate(x)]
        assert torch.equal(x, run.x), run.label
        assert all(torch.equal(kept, copy) for kept, copy in seen), run.label


@every_solver
def test_the_same_run_gives_the_same_bits(name: str) -> None:
    for run in runs(name):
        again = run.integrate(run.x)
        assert all(torch.equal(one.x, other.x) for one, other in zip(run.steps, again, strict=True)), run.label


@every_solver
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    for run in runs(name):
        for row in range(len(run.x)):
            alone = run.solve(run.x[row : row + 1], NOISE.rows([row]))
            # Elementwise arithmetic may be vectorised otherwise for another size: a few last bits.
            assert torch.allclose(alone, run.x0[row : row + 1], rtol=1e-10, atol=1e-12), run.label


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_device_and_shape_stay(name: str, dtype: torch.dtype) -> None:
    for run in runs(name):
        x = next(iter(run.integrate(run.x.to(dtype)))).x
        assert (x.dtype, x.device, x.shape) == (dtype, run.x.device, run.x.shape), run.label


@every_solver
def test_a_run_resumed_from_a_file_gives_the_same_bits(name: str) -> None:
    for run in runs(name):
        file = io.BytesIO()
        torch.save(run.steps[2].checkpoint(), file)
        file.seek(0)
        rest = list(run.integrate(torch.zeros_like(run.x), resume=torch.load(file, weights_only=True)))
        assert [step.index for step in rest] == [3, 4], run.label
        assert torch.equal(rest[-1].x, run.x0), run.label


@every_solver
def test_one_step_is_finite(name: str) -> None:
    for run in runs(name):
        assert bool(torch.isfinite(run.solve(run.x, steps=1)).all()), run.label


@every_solver
def test_gradients_flow_and_change_no_bits(name: str) -> None:
    for run in runs(name):
        with torch.no_grad():
            assert torch.equal(run.solve(run.x), run.x0), run.label
        leaf = run.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run.solve(leaf).sum(), leaf)
        assert bool(torch.isfinite(gradient).all()), run.label
        assert bool((gradient != 0).any()), run.label


@every_solver
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


@every_solver
def test_eps_prediction_at_zero_snr_is_refused(name: str) -> None:
    schedule = SCHEDULES["zero snr"]
    denoiser = NetworkDenoiser(network, schedule, "eps")
    x = Noise(0).normal(SHAPE)
    with refused("unsupported", "predicts"):
        solve(denoiser, schedule, EVERY[name](), grids.trailing(schedule, 4), x)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "adaptive"])  # which takes sub-steps in the pair
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


@every_solver
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
