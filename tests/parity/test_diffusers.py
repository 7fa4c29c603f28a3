"""diffusers' schedulers, step by step: the stored runs, and the installed library with other settings.

diffusers' Euler, Heun and Euler-ancestral walk in x/a; their results are brought back to x by a = 1/√(1 + σ²).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process import (
    Denoiser,
    GivenNoise,
    NetworkDenoiser,
    Prediction,
    Predicts,
    Schedule,
    grids,
    schedules,
)
from carrara.process.prediction import scales
from carrara.process.schedules import Time
from carrara.solvers import (
    DDIM,
    DEIS,
    PLMS,
    Ancestral,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Solver,
    UniPC,
    integrate,
)
from tests.parity.reference import Reference

CASE = Reference("h1_diffusers_schedulers")
STABLE_DIFFUSION = schedules.scaled_linear(1000)
RUNS: dict[str, Solver] = {
    "ddim": DDIM(),
    "ddim_eta05": DDIM(eta=0.5),
    "ddpm": Ancestral(variance="small"),
    "pndm": PLMS(),
    "dpmpp_2m": DPMSolver(order=2),
    "dpmpp_2m_karras": DPMSolver(order=2),
    "unipc": UniPC(order=2),
    "euler": Euler(),
    "heun": Heun(),
    "euler_a": EulerAncestral(),
}
IN_EDM_VARIABLES = ("euler", "heun", "euler_a")


def eps(x: Tensor, timestep: float) -> Tensor:
    """The analytic model of the notes, told the scheduler's timestep (ours less one)."""
    phase = math.pi / 2 * timestep / 1000
    return x * math.sin(phase) + 0.1 * (3 * x).sin() * math.cos(phase)


def told(timesteps: dict[float, float]) -> Denoiser:
    """The model at our times, told what the scheduler tells it there (Karras' levels are rounded to a timestep)."""

    def call(x: Tensor, t: Time, condition: Condition) -> Prediction:
        alpha, sigma = scales(STABLE_DIFFUSION, t, x)
        return Prediction.from_eps(x, eps(x, timesteps.get(float(t), float(t) - 1)), alpha, sigma)

    return call


def levels(sigmas: Tensor, schedule: Schedule) -> list[float]:
    """Our times of diffusers' σ = s/a, the last of which is 0."""
    times: list[float] = schedule.time_at(-2 * sigmas[:-1].double().log()).tolist()
    return [*times, 0.0]


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", RUNS)
def test_stored_run(name: str, steps: int) -> None:
    stored = f"{name}.{steps}"
    timesteps = list(dict.fromkeys(CASE.output(f"{stored}.timesteps").tolist()))  # PNDM and Heun repeat some
    last = 1.0 if name in ("ddim", "ddim_eta05", "pndm") else 0.0  # set_alpha_to_one=False
    times = [*(t + 1.0 for t in timesteps), last]
    if name == "dpmpp_2m_karras":
        times = levels(CASE.output(f"{stored}.sigmas"), STABLE_DIFFUSION)
        times[0] = 1000.0
    grid = grids.given(STABLE_DIFFUSION, times)
    x = CASE.input("latents")
    noise = GivenNoise(tensors=(x, *CASE.input("noise_seq")))
    model = told(dict(zip(times, timesteps, strict=False)))
    found = torch.stack([x, *(s.x for s in integrate(model, STABLE_DIFFUSION, RUNS[name], grid, x, noise=noise))])
    visited = CASE.output(f"{stored}.traj")
    if name in ("heun", "pndm"):  # whose repeated timesteps are the halves of one step of ours
        again = range(2, len(visited) - 1, 2) if name == "heun" else [2, *range(3, len(visited) - 1)]
        visited = visited[[0, *again, len(visited) - 1]]
    if name in IN_EDM_VARIABLES:
        visited = visited * torch.tensor([float(STABLE_DIFFUSION.alpha(t)) for t in times]).reshape(-1, 1, 1, 1, 1)
    # diffusers' own tables are float32; near-equal float32 levels leave some 1e-5 of x.
    tolerance = 4 * 2e-6 + 1e-5 * float(visited.abs().max())
    assert float((found - visited).abs().max()) <= tolerance


@dataclass(frozen=True)
class Peer:
    """A diffusers scheduler in some setting, and what we say for it.

    Attributes:
        scheduler: the class's name.
        settings: its arguments beyond the β table.
        solver: ours.
        left_out: how many of its last states are not compared: its UniPC lowers the order toward the end, and with
            B1 gives NaN at the clean point; its DEIS ends at the last level.
    """

    scheduler: str
    settings: dict[str, Any]
    solver: Solver
    left_out: int = 0

    def __str__(self) -> str:
        return f"{self.scheduler} {self.settings} {self.solver}"


PEERS = [
    Peer("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, DDIM()),
    Peer(
        "DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, DDIM()
    ),
    Peer("DPMSolverMultistepScheduler", {"solver_order": 1}, DPMSolver(order=1)),
    Peer("DPMSolverMultistepScheduler", {"solver_type": "heun"}, DPMSolver(order=2, solver_type="heun")),
    Peer("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, DPMSolver(order=2)),
    Peer("DPMSolverMultistepScheduler", {"solver_order": 3}, DPMSolver(order=3, published=True)),
    Peer("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, DPMSolver(order=2)),
    Peer("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, DPMSolver(order=2, eta=1.0)),
    Peer("UniPCMultistepScheduler", {"solver_order": 1}, UniPC(order=1)),
    Peer(
        "UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh1"}, UniPC(order=1, variant="B1"), left_out=1
    ),
    Peer(
        "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, UniPC(order=2, variant="B1"), left_out=1
    ),
    Peer("UniPCMultistepScheduler", {"solver_order": 3}, UniPC(order=3), left_out=2),
    Peer("UniPCMultistepScheduler", {"use_karras_sigmas": True}, UniPC(order=2)),
    Peer("DEISMultistepScheduler", {"solver_order": 2}, DEIS(order=2), left_out=1),
    Peer("DEISMultistepScheduler", {"solver_order": 3}, DEIS(order=3), left_out=1),
    Peer("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, Euler()),
    Peer("EulerDiscreteScheduler", {"use_karras_sigmas": True}, Euler()),
]


@pytest.mark.parametrize("steps", [20, 25])  # divisors of 1000: diffusers' DDIM infers its neighbour as t - 1000//steps
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_installed_scheduler(peer: Peer, predicts: Predicts, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    zero_snr = bool(peer.settings.get("rescale_betas_zero_snr"))
    if zero_snr and predicts == "eps":
        pytest.skip("undefined at zero SNR")
    scheduler = getattr(diffusers, peer.scheduler)(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[predicts],
        **({"timestep_spacing": "linspace"} | peer.settings),
    )
    scheduler.set_timesteps(steps)
    schedule: Schedule = schedules.linear(1000)
    if zero_snr:
        schedule = schedules.zero_terminal_snr(schedules.linear(1000))
    timesteps: list[float] = [float(t) for t in scheduler.timesteps]
    sigmas = getattr(scheduler, "sigmas", None)
    times = [*(t + 1 for t in timesteps), 0.0]
    if sigmas is not None:
        times = levels(sigmas, schedule)
    grid = grids.given(schedule, [min(t, schedule.final_time) for t in times])
    asked_at = dict(zip(grid.times.tolist(), timesteps, strict=False))
    draws = tuple(torch.randn(steps + 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def ours(x: Tensor, t: Time, condition: Condition) -> Prediction:
        return NetworkDenoiser(lambda x, *_: raw(x, asked_at[float(t)]), schedule, predicts)(x, t, condition)

    visited = theirs(scheduler, timesteps, sigmas, draws, peer.scheduler == "EulerDiscreteScheduler")
    walk = integrate(ours, schedule, peer.solver, grid, draws[0], noise=GivenNoise(tensors=draws))
    for index, (step, other) in enumerate(zip(walk, visited, strict=True)):
        if index >= steps - peer.left_out:
            break
        # Their tables are float32, whose 1 - ᾱ keeps 1e-7/(1 - ᾱ) of itself at the clean end: 1e-4 at worst.
        torch.testing.assert_close(step.x, other, rtol=3e-4, atol=3e-4, msg=f"step {index}")


def raw(x: Tensor, timestep: float) -> Tensor:
    """A model output for a timestep, of moderate size whatever it stands for."""
    phase = math.pi / 2 * timestep / 1000
    return 0.7 * x * math.sin(phase) + 0.3 * (2 * x).sin() * math.cos(phase)


def theirs(
    scheduler: Any, timesteps: Sequence[float], sigmas: Tensor | None, draws: Sequence[Tensor], in_edm_variables: bool
) -> list[Tensor]:
    """Every state of the scheduler's own loop, as x."""
    if in_edm_variables:
        assert sigmas is not None
        scale = [1 / math.sqrt(1 + float(s) ** 2) for s in sigmas]
    else:
        scale = [1.0] * (len(timesteps) + 1)
    x = draws[0] / scale[0]
    visited = []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        more: dict[str, Any] = {}
        if getattr(scheduler.config, "algorithm_type", "") == "sde-dpmsolver++":
            more["variance_noise"] = draws[i + 1]
        x = scheduler.step(raw(seen, float(t)), t, x, **more).prev_sample
        visited.append(x * scale[i + 1])
    return visited
