"""k-diffusion's samplers on an exact denoiser, with its stored noise, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process import GaussianMixture, GivenNoise, Prediction, Schedule, grids, schedules
from carrara.process.schedules import Time
from carrara.process.transitions import Transition
from carrara.solvers import (
    DDIM,
    LMS,
    Adaptive,
    DPMSolver,
    DPMSolver2S,
    Euler,
    EulerAncestral,
    Heun,
    Solver,
    integrate,
    solve,
)
from carrara.solvers.base import bound
from tests.parity.reference import Reference

CASE = Reference("f1_kdiffusion_samplers")
SCHEDULE = schedules.edm(sigma_min=0.02, sigma_max=40.0 * (1 + 1e-6))  # the stored sigmas were rounded to float32
CHURN = {"churn": 2.0, "s_min": 0.1, "s_max": 20.0, "s_noise": 1.003}
RUNS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "lms": LMS(),
    "dpmpp_2m": DPMSolver(order=2),
    "euler_ancestral": EulerAncestral(),
    "dpmpp_2s_ancestral": DPMSolver2S(eta=1.0),
    "dpmpp_2m_sde_midpoint": DPMSolver(order=2, eta=1.0),
    "dpmpp_2m_sde_heun": DPMSolver(order=2, eta=1.0, solver_type="heun"),
    "dpmpp_3m_sde": DPMSolver(order=3, eta=1.0, solver_type="heun", published=True),
    "euler_churn": Euler(**CHURN),
    "heun_churn": Heun(**CHURN),
}


def mixture(case: Reference) -> GaussianMixture:
    return GaussianMixture(case.input("gmm_weights"), case.input("gmm_means"), case.input("gmm_stds") ** 2)


@pytest.mark.parametrize("name", RUNS)
def test_sampler(name: str) -> None:
    """Every denoised image along the way, and the end; the reference's README asks for 1e-9."""
    x, grid = CASE.input("x"), grids.given(SCHEDULE, CASE.input("sigmas"))
    noise = GivenNoise(tensors=(x, *CASE.input("noise_seq")))
    steps = list(integrate(mixture(CASE).denoiser(SCHEDULE), SCHEDULE, RUNS[name], grid, x, noise=noise))
    denoised = torch.stack([step.prediction.x0 for step in steps])
    torch.testing.assert_close(denoised, CASE.output(f"{name}.denoised"), rtol=1e-9, atol=1e-9)
    if name == "lms":
        return  # k-diffusion extrapolates into σ = 0; every method of ours ends at the prediction there
    torch.testing.assert_close(steps[-1].x, CASE.output(f"{name}.x"), rtol=1e-9, atol=1e-9)


def test_adaptive_arrives_where_the_adaptive_sampler_does() -> None:
    """k-diffusion's dpm_adaptive is another method (5 % tolerance, float32 times): the same flow, to σ_min."""
    x = CASE.input("x")
    down = grids.given(SCHEDULE, [40.0, 0.02])
    found = solve(mixture(CASE).denoiser(SCHEDULE), SCHEDULE, Adaptive(rtol=1e-6, atol=1e-6), down, x)
    torch.testing.assert_close(found, CASE.output("dpm_adaptive.x"), rtol=0, atol=0.05)


@pytest.mark.parametrize(("stored", "rho"), [("karras", 7.0), ("karras_rho5", 5.0)])
def test_karras_grid(stored: str, rho: float) -> None:
    schedule = schedules.edm(0.02, 40.0)
    # The original computes them in float32.
    torch.testing.assert_close(
        grids.karras(schedule, 10, rho).times, CASE.output(f"schedule.{stored}"), rtol=2e-6, atol=0
    )


def test_exponential_grid_is_uniform_in_log_snr() -> None:
    schedule = schedules.edm(0.02, 40.0)
    torch.testing.assert_close(
        grids.log_snr(schedule, 10).times, CASE.output("schedule.exponential"), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_split_of_the_noise(eta: float) -> None:
    """σ_down and σ_up are DDIM's direction and noise in EDM's variables."""
    stored = CASE.output(f"get_ancestral_step.eta{eta}")
    sigmas = CASE.input("sigmas")
    schedule: Schedule = SCHEDULE
    ours = [_down_and_up(schedule, DDIM(eta), float(t), float(s)) for t, s in itertools.pairwise(sigmas)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), stored.reshape(-1, 2), rtol=1e-9, atol=1e-9)


def _down_and_up(schedule: Schedule, solver: Solver, t: float, s: float) -> tuple[float, float]:
    """What one step makes of ε̂ = 1 (with x̂_0 = 0) and of z = 1."""

    def flat(x: Tensor, t: Time, condition: Condition) -> Prediction:
        return Prediction.from_eps(x, x / float(t), 1.0, float(t))

    def end(x: float, z: float) -> float:
        noise = GivenNoise(tensors=(torch.full((1, 1), z, dtype=torch.float64),))
        start = torch.full((1, 1), x, dtype=torch.float64)
        return float(solver.step(bound(flat, Condition()), Transition.of(schedule, t, s), start, None, noise).x)

    return end(t, 0.0), end(0.0, 1.0)
