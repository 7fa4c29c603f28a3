"""EDM's own sampler, with and without churn, against Heun on Karras' grid, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process import GaussianMixture, GivenNoise, Prediction, grids, schedules
from carrara.process.schedules import Time, VarianceExploding
from carrara.solvers import Euler, Heun, Solver, integrate
from tests.parity.reference import Reference

CASE = Reference("f3_edm_samplers")
DEFAULT = schedules.edm()
NARROW = schedules.edm(0.02, 40.0)
RUNS: dict[str, tuple[VarianceExploding, int, Solver]] = {
    "heun18": (DEFAULT, 18, Heun()),
    "heun10": (NARROW, 10, Heun()),
    "heun10_churn": (NARROW, 10, Heun(churn=4, s_min=0.05, s_max=20, s_noise=1.003)),
    # The ablation sampler in EDM's own setting; its VP and VE settings step in another time variable than σ.
    "abl_euler_edm": (DEFAULT, 12, Euler()),
}


@pytest.mark.parametrize("name", RUNS)
def test_sampler(name: str) -> None:
    schedule, steps, solver = RUNS[name]
    mixture = GaussianMixture(CASE.input("gmm_weights"), CASE.input("gmm_means"), CASE.input("gmm_stds") ** 2)
    exact = mixture.denoiser(schedule)
    asked: list[float] = []

    def listening(x: Tensor, t: Time, condition: Condition) -> Prediction:
        asked.append(float(t))
        return exact(x, t, condition)

    latents = CASE.input("latents")
    grid = grids.karras(schedule, steps)
    noise = GivenNoise(tensors=(latents, *CASE.input("noise_seq")))
    *_, last = integrate(listening, schedule, solver, grid, latents * grid.times[0], noise=noise)
    assert len(asked) == int(CASE.output(f"{name}.nfe"))
    torch.testing.assert_close(
        torch.tensor(asked, dtype=torch.float64), CASE.output(f"{name}.model_sigmas"), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(last.x, CASE.output(f"{name}.x"), rtol=1e-9, atol=1e-9)
