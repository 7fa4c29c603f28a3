"""Latent diffusion's own DDIM and PLMS loops on its analytic model, with its stored noise, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.guidance import classifier_free
from carrara.process import GivenNoise, Grid, NetworkDenoiser, grids, schedules
from carrara.solvers import DDIM, PLMS, Solver, Step, integrate
from tests.parity.reference import Reference

CASE = Reference("d3_ldm_samplers")
TABLE = schedules.scaled_linear(1000, 0.00085, 0.012)
RUNS = (
    "ddim10",
    "ddim20_cfg",
    "ddim10_eta05",
    "ddim10_mask",
    "plms10",
    "plms20_cfg",
)
"""By name: the stored settings are read in the test, which is skipped where they are absent."""
TOLERANCE = 5e-6
"""The originals compute in float32: 20 steps of rounding, over values of order 1."""


def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The analytic model of the notes; the condition is a vector [B, 4]."""
    assert condition.vector is not None
    phase = (math.pi / 2 * time / CASE.config["T"]).reshape(-1, 1, 1, 1)
    shift = CASE.config["cond_scale"] * condition.vector[:, :, None, None]
    answer: Tensor = x * phase.sin() + (0.1 * (3 * x).sin() + shift) * phase.cos()
    return answer


def grid(name: str) -> Grid:
    """Its steps are 1, 1 + T/S, … of a table that counts from 0, and its last ends at the first level, not at 0."""
    return grids.given(TABLE, [float(t) + 1 for t in CASE.output(f"{name}.ddim_timesteps").flip(0)] + [1.0])


def test_every_stored_run_is_compared() -> None:
    assert sorted(RUNS) == sorted(run["name"] for run in CASE.config["runs"])


def test_the_schedule_is_its_table() -> None:
    """What latent diffusion calls linear is linear in √β."""
    torch.testing.assert_close(TABLE.betas, CASE.output("betas"), rtol=1e-12, atol=0)
    torch.testing.assert_close(TABLE.alphas_cumprod, CASE.output("alphas_cumprod"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", RUNS)
def test_every_step_of_its_loop(name: str) -> None:
    run = next(run for run in CASE.config["runs"] if run["name"] == name)
    x = CASE.input("x_T")
    noise = GivenNoise(tensors=(x, *CASE.input("noise_seq")))
    solver: Solver = PLMS() if run["sampler"] == "plms" else DDIM(eta=run.get("eta", 0.0))
    condition, null = Condition(vector=CASE.input("c")), Condition(vector=CASE.input("uc"))
    denoiser = classifier_free(run.get("guidance", 1.0), null)(NetworkDenoiser(network, TABLE, "eps"))
    steps: Any = integrate(denoiser, TABLE, solver, grid(name), x, condition, noise=noise)
    if run.get("mask"):
        steps = masked(denoiser, grid(name), x, condition)
    found = list(steps)
    close(torch.stack([x, *(step.x for step in found)]), CASE.output(f"{name}.traj"))
    if run["sampler"] == "ddim":  # PLMS reports x̂_0 of its combined ε̂, ours that of the network's
        close(torch.stack([step.prediction.x0 for step in found]), CASE.output(f"{name}.pred_x0"))


def masked(denoiser: Any, grid: Grid, x: Tensor, condition: Condition) -> Iterator[Step]:
    """Its inpainting: before each step the kept region is noised to the step's level, with the same noise."""
    mask, clean, noise = CASE.input("mask"), CASE.input("x0"), CASE.input("q_noise")
    for t, s in zip(grid.times.tolist(), grid.times.tolist()[1:], strict=False):
        seen = mask * (TABLE.alpha(t) * clean + TABLE.sigma(t) * noise) + (1 - mask) * x
        (step,) = integrate(denoiser, TABLE, DDIM(), grids.given(TABLE, [t, s]), seen, condition)
        x = step.x
        yield step


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
