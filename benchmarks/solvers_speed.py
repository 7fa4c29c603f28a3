"""What a solver itself costs a step, beside diffusers' scheduler of the same method, and whether a long walk grows.

    python -m benchmarks.solvers_speed [--pairs 41] [--threads 1] [--steps 20] [--parts step growth]

A batch [64, 3, 32, 32] in float32. The network is a stored tensor, so that what is timed is everything else: turning
its output into what the method needs, the method, and ours' check for NaN. Noise is a stored tensor on both sides.
Contestants run in turn in one process, each pair of walks gives one ratio, and only the median ratio is a claim.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.process import Grid, Noise, Prediction, grids, schedules
from carrara.process.prediction import scales
from carrara.process.schedules import Time
from carrara.solvers import (
    DDIM,
    DEIS,
    LMS,
    PLMS,
    SOLVERS,
    Ancestral,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Solver,
    UniPC,
)
from carrara.solvers import integrate as walk

SHAPE = (64, 3, 32, 32)
SCHEDULE = schedules.linear(1000)
EPS, START, DRAW = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3))


@dataclass(frozen=True)
class Stored(Noise):
    """The same draw every time, at no cost."""

    def normal(self, shape: Sequence[int], sub: int = 0, dtype: Any = None, device: Any = None) -> Tensor:
        return DRAW


def network(x: Tensor, t: Time, condition: Condition) -> Prediction:
    """A denoiser whose network costs nothing."""
    return Prediction.from_eps(x, EPS, *scales(SCHEDULE, t, x))


CONTESTS: dict[str, tuple[Solver, str, dict[str, Any]]] = {
    "DDIM": (DDIM(), "DDIMScheduler", {"clip_sample": False}),
    "DDPM": (Ancestral(variance="small"), "DDPMScheduler", {"clip_sample": False}),
    "Euler": (Euler(), "EulerDiscreteScheduler", {}),
    "Euler ancestral": (EulerAncestral(), "EulerAncestralDiscreteScheduler", {}),
    "Heun": (Heun(), "HeunDiscreteScheduler", {}),
    "DPM++ 2M": (DPMSolver(order=2), "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++ 3M": (DPMSolver(order=3), "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 2M SDE": (
        DPMSolver(order=2, eta=1.0),
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC 2": (UniPC(order=2), "UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC 3": (UniPC(order=3), "UniPCMultistepScheduler", {"solver_order": 3}),
    "PLMS": (PLMS(), "PNDMScheduler", {"skip_prk_steps": True}),
    "DEIS 3": (DEIS(order=3), "DEISMultistepScheduler", {"solver_order": 3}),
    "LMS": (LMS(), "LMSDiscreteScheduler", {}),
}


def their_walk(name: str, settings: dict[str, Any], steps: int) -> Callable[[], None]:
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **settings)

    def run() -> None:
        scheduler.set_timesteps(steps)
        x = START
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(EPS, t, x).prev_sample

    return run


def our_walk(solver: Solver, grid: Grid) -> Callable[[], None]:
    def run() -> None:
        for _ in walk(network, SCHEDULE, solver, grid, START, noise=Stored()):
            pass

    return run


def clock() -> float:
    """Seconds of this thread where it is the only one, so that other work on the machine tells less."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Callable[[], None]) -> float:
    start = clock()
    run()
    return clock() - start


def step_costs(pairs: int, steps: int) -> None:
    print(f"{'method':16} {'ours':>10} {'theirs':>10}   ours/theirs (quartiles), {steps} steps, {pairs} pairs")
    for name, (solver, scheduler, settings) in CONTESTS.items():
        ours, theirs = our_walk(solver, grids.linspace(SCHEDULE, steps)), their_walk(scheduler, settings, steps)
        module = f"diffusers.schedulers.{_module(scheduler)}"
        with mock.patch(f"{module}.randn_tensor", return_value=DRAW, create=True):
            ours(), theirs()
            times = [(timed(ours), timed(theirs)) for _ in range(pairs)]
        low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
        a, b = (statistics.median(column) / steps * 1e6 for column in zip(*times, strict=True))
        print(f"{name:16} {a:7.0f} µs {b:7.0f} µs   {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


def _module(scheduler: str) -> str:
    import diffusers

    return str(getattr(diffusers, scheduler).__module__.rsplit(".", 1)[-1])


def growth() -> None:
    """The first and the last hundred of 1,000 steps, and the memory between them."""
    print(f"{'solver':16} {'last/first 100':>15} {'memory':>12}")
    for name in SOLVERS:
        if name == "adaptive":
            continue  # its cost is its sub-steps', which the tolerance decides
        marks = [
            (clock(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            for step in walk(network, SCHEDULE, SOLVERS[name](), grids.trailing(SCHEDULE, 1000), START, noise=Stored())
            if step.index in (100, 200, 899, 999)
        ]
        ratio = (marks[3][0] - marks[2][0]) / (marks[1][0] - marks[0][0])
        print(f"{name:16} {ratio:15.2f} {(marks[3][1] - marks[1][1]) / 1024:9.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parts", nargs="+", choices=["step", "growth"], default=["step", "growth"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {arguments.threads} threads")
    with torch.no_grad():
        if "step" in arguments.parts:
            step_costs(arguments.pairs, arguments.steps)
        if "growth" in arguments.parts:
            growth()


if __name__ == "__main__":
    main()
