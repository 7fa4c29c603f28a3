"""Whole sampling loops of guided-diffusion, with its stored noise, against `integrate` on the same grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.guidance import static_threshold
from carrara.process import Denoiser, GivenNoise, Prediction
from carrara.process.prediction import scales
from carrara.process.schedules import Time
from carrara.process.transitions import Transition
from carrara.solvers import DDIM, Ancestral, Solver, integrate
from carrara.solvers.base import bound
from tests.parity.reference import GUIDED_DIFFUSION_CASES, GuidedDiffusion


@pytest.fixture(params=GUIDED_DIFFUSION_CASES)
def case(request: pytest.FixtureRequest) -> GuidedDiffusion:
    return GuidedDiffusion(request.param)


def clipped(case: GuidedDiffusion) -> Denoiser:
    return static_threshold()(case.denoiser)


def guided(denoiser: Denoiser, how: str) -> Denoiser:
    """The stored runs' cond_fn, 0.2 cos x, folded into the score or left for the ancestral mean."""

    def call(x: Tensor, t: Time, condition: Condition) -> Prediction:
        prediction = denoiser(x, t, condition)
        gradient = 0.2 * x.cos()
        if how == "score":
            return prediction.with_score(gradient)
        p = prediction
        return Prediction(p.x, p.alpha, p.sigma, p.x0, p.eps, p.variance_fraction, pending=gradient)

    return call


def trajectory(case: GuidedDiffusion, denoiser: Denoiser, solver: Solver) -> Tensor:
    x = case.input("x_T")
    noise = GivenNoise(tensors=(x, *case.input("noise_seq")))
    steps = integrate(denoiser, case.schedule, solver, case.grid, x, noise=noise)
    return torch.stack([x, *(step.x for step in steps)])


LOOPS: dict[str, tuple[Callable[[GuidedDiffusion], Denoiser], Callable[[GuidedDiffusion], Solver]]] = {
    "p_sample.traj": (clipped, lambda case: Ancestral(variance=case.variance)),
    "p_sample_guided.traj": (
        lambda case: guided(clipped(case), "pending"),
        lambda case: Ancestral(variance=case.variance),
    ),
    "ddim_eta0.traj": (clipped, lambda case: DDIM()),
    "ddim_eta0_noclip.traj": (lambda case: case.denoiser, lambda case: DDIM()),
    "ddim_eta05.traj": (clipped, lambda case: DDIM(eta=0.5)),
    "ddim_eta1.traj": (clipped, lambda case: DDIM(eta=1.0)),
    "ddim_guided.traj": (lambda case: guided(clipped(case), "score"), lambda case: DDIM()),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_sampling_loop(case: GuidedDiffusion, loop: str) -> None:
    if not case.has(loop):
        pytest.skip(f"{case.name} stores no {loop}")
    denoiser, solver = LOOPS[loop]
    case.check(loop, trajectory(case, denoiser(case), solver(case)))


def test_ddim_reverse_loop(case: GuidedDiffusion) -> None:
    """guided-diffusion predicts ε̂ at the time it starts from, we at the time it goes to (docs/math.md §10); it starts
    with the image at the first level. Predicted as it does, every step is the same. Its last leads beyond the table."""
    grid = case.grid.reversed()
    asked_at = dict(zip(grid.times[2:].tolist(), grid.times[1:].tolist(), strict=False))

    def earlier(x: Tensor, t: Time, condition: Condition) -> Prediction:
        before = asked_at[float(t)]
        eps = case.denoiser(x, before, condition).eps
        return Prediction.from_eps(x, eps, *scales(case.schedule, t, x))

    x = case.input("img")
    pairs = grid.pairs()[1:]
    visited = [x]
    for t, s in pairs:
        step = DDIM().step(
            bound(earlier, Condition()), Transition.of(case.schedule, t, s), visited[-1], None, GivenNoise()
        )
        visited.append(step.x)
    stored = case.output("ddim_reverse.traj")
    tolerance = case.tolerance("ddim_reverse.traj")
    tolerance = tolerance[:-1] if isinstance(tolerance, Tensor) else tolerance
    assert bool(((torch.stack(visited) - stored[:-1]).abs() <= tolerance).all())
