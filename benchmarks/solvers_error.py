"""Error against evaluations: every solver and grid of ours, every deterministic scheduler of diffusers.

    python -m benchmarks.solvers_error [--out docs/images] [--samples 256] [--counts 5 8 10 15 20 30 50]
    python -m benchmarks.solvers_error --model runs/digits        # the same curves on a trained model

The oracle part: 8 components in 64 dimensions, DDPM's linear schedule, no model error. The error of a sample is the
root mean square distance to the exact flow walked finely to t = 1 and closed by x̂_0; the table gives medians over
samples. The optimised grids are found on `carrara.solvers.tuning.prior`, which holds none of the mixtures tested.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import solvers_peers
from carrara.condition import Condition
from carrara.process import Denoiser, GaussianMixture, Grid, Noise, Prediction, Schedule, grids, schedules
from carrara.process.schedules import Time
from carrara.solvers import (
    DDIM,
    DEIS,
    LMS,
    PLMS,
    Adaptive,
    DPMSolver,
    DPMSolver2S,
    Heun,
    Picard,
    Solver,
    UniPC,
    integrate_parallel,
    optimised_grid,
    solve,
)

SCHEDULE = schedules.linear(1000)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
COUNTS = (5, 8, 10, 15, 20, 30, 50)
SOLVERS: dict[str, Solver] = {
    "DDIM": DDIM(),
    "Heun": Heun(),
    "DPM++ 2S": DPMSolver2S(),
    "DPM++ 2M": DPMSolver(order=2),
    "DPM++ 3M": DPMSolver(order=3),
    "UniPC 2": UniPC(order=2),
    "UniPC 3": UniPC(order=3),
    "DEIS 3": DEIS(order=3),
    "LMS": LMS(),
    "PLMS": PLMS(),
}
TUNED = ("DPM++ 2M", "UniPC 2", "UniPC 3", "DEIS 3")
SPACINGS: dict[str, Callable[[Schedule, int], Grid]] = {
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "trailing": grids.trailing,
    "linspace": grids.linspace,
}


@dataclass
class Counting:
    """A denoiser that counts how often it is asked."""

    inner: Denoiser
    asked: int = 0

    def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
        self.asked += 1
        return self.inner(x, t, condition)


@dataclass(frozen=True)
class Problem:
    """Where to start, with what, and where the exact flow ends."""

    denoiser: Denoiser
    schedule: Schedule
    start: Tensor
    condition: Condition = field(default_factory=Condition)
    fine_steps: int = 600

    def along(self, solver: Solver, grid: Grid) -> Tensor:
        """The end of a walk."""
        return solve(self.denoiser, self.schedule, solver, grid, self.start, self.condition)

    def exact(self) -> Tensor:
        """The end of a fine walk."""
        return self.along(UniPC(order=3), grids.log_snr(self.schedule, self.fine_steps))

    def walk(self, solver: Solver, make: Callable[[Schedule, int], Grid], evaluations: int) -> Tensor:
        """The end of the longest walk that asks at most `evaluations` times."""
        for steps in (evaluations, evaluations - 1, (evaluations + 1) // 2):
            counting = Counting(self.denoiser)
            found = solve(counting, self.schedule, solver, make(self.schedule, steps), self.start, self.condition)
            if counting.asked <= evaluations:
                return found
        raise AssertionError(f"{solver} asks too often")


def error(found: Tensor, exact: Tensor) -> float:
    """Median over samples of the root mean square error; infinite where it is not a number."""
    value = float((found - exact).flatten(1).pow(2).mean(1).sqrt().median())
    return value if math.isfinite(value) else math.inf


def mixture(seed: int, scale: float, low: float, high: float) -> GaussianMixture:
    """8 components in 64 dimensions: means of standard deviation `scale`, variances between `low` and `high`."""
    noise = Noise(seed)
    means = scale * noise.normal((8, 64), dtype=torch.float64)
    shares = noise.uniform((2, 8), sub=1)
    return GaussianMixture(0.3 + shares[0], means, low + (high - low) * shares[1])


MIXTURES = {
    "wide": mixture(100, 1.0, 0.02, 0.1),
    "images": mixture(101, 0.5, 0.02, 0.1),
    "sharp": mixture(102, 0.5, 0.005, 0.02),
}


def problem_of(data: GaussianMixture, samples: int) -> Problem:
    start = Noise(1).normal((samples, 64), dtype=torch.float64) * SCHEDULE.sigma(SCHEDULE.final_time)
    return Problem(data.denoiser(SCHEDULE), SCHEDULE, start)


def theirs(data: GaussianMixture, problem: Problem, exact: Tensor, evaluations: int) -> tuple[float, str]:
    """The least error of all schedulers, and which."""
    level = data.denoiser(schedules.edm(1e-6, 1e6))

    def eps_at(x: Tensor, a: float, s: float) -> Tensor:
        return level(x / a, s / a, Condition()).eps

    best = (math.inf, "none")
    for peer in solvers_peers.every():
        try:
            found, asked = peer.walk(BETAS, evaluations, eps_at, problem.start)
        except (RuntimeError, IndexError, ValueError, AssertionError):
            continue  # some settings do not exist at some counts, and say so in many ways
        assert asked <= evaluations, peer
        best = min(best, (error(found, exact), str(peer)))
    return best


def tuned_grids(counts: Sequence[int]) -> dict[tuple[str, int], Grid]:
    """The optimised grid of each solver and count, with the seconds it took."""
    found = {}
    for name in TUNED:
        for count in counts:
            began = time.perf_counter()
            found[name, count] = optimised_grid(SCHEDULE, SOLVERS[name], count)
            print(f"found {name} {count}: {found[name, count].name} in {time.perf_counter() - began:.1f} s", flush=True)
    return found


def oracle_tables(counts: Sequence[int], samples: int) -> dict[str, list[float]]:
    """Print the tables; the geometric mean over the mixtures of each contestant's errors."""
    tuned = tuned_grids(counts)
    results: dict[str, dict[str, list[float]]] = {}
    for title, data in MIXTURES.items():
        problem = problem_of(data, samples)
        exact = problem.exact()
        curves: dict[str, list[float]] = {}
        for name, solver in SOLVERS.items():
            for spacing, make in SPACINGS.items():
                curves[f"{name}, {spacing}"] = [error(problem.walk(solver, make, n), exact) for n in counts]
        for name in TUNED:
            ends = [problem.along(SOLVERS[name], tuned[name, n]) for n in counts]
            curves[f"{name}, optimised"] = [error(end, exact) for end in ends]
        peers = [theirs(data, problem, exact, n) for n in counts]
        curves["diffusers' best"] = [value for value, _ in peers]
        results[title] = curves
        print_comparison(title, counts, curves, [name for _, name in peers])
    means = averaged(counts, results)
    print_solvers(counts, means)
    return means


def print_comparison(title: str, counts: Sequence[int], curves: dict[str, list[float]], peers: list[str]) -> None:
    print(
        f"\n### {title}\n\n| evaluations | diffusers' best | which | ours, even grids | which | ours | which | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    own = {name: values for name, values in curves.items() if name != "diffusers' best"}
    for i, n in enumerate(counts):
        peer = curves["diffusers' best"][i]
        even, even_name = min((v[i], k) for k, v in own.items() if "optimised" not in k)
        best, name = min((v[i], k) for k, v in own.items())
        cells = [f"{peer:.2g}", peers[i], f"{even:.2g}", even_name, f"{best:.2g}", name, f"{best / peer:.2f}"]
        print(f"| {n} | " + " | ".join(cells) + " |", flush=True)


def averaged(counts: Sequence[int], results: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """The geometric mean over the mixtures of every curve."""
    many = list(results.values())
    return {
        name: [math.exp(sum(math.log(curves[name][i]) for curves in many) / len(many)) for i in range(len(counts))]
        for name in many[0]
    }


def print_solvers(counts: Sequence[int], curves: dict[str, list[float]]) -> None:
    print("\n### every solver\n\n| | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for name, values in curves.items():
        print(f"| {name} | " + " | ".join(f"{v:.2g}" for v in values) + " |")


def picard_table(samples: int) -> None:
    """Sequential evaluations that parallel sampling needs for a walk of 100 DDIM steps."""
    problem = problem_of(MIXTURES["images"], samples)
    grid = grids.trailing(SCHEDULE, 100)
    sequential = solve(problem.denoiser, SCHEDULE, DDIM(), grid, problem.start)
    print("\n| tolerance | sweeps for 100 steps | distance to sequential |\n|---|---|---|")
    for tolerance in (1e-2, 1e-3, 1e-4):
        *_, last = sweeps = list(
            integrate_parallel(problem.denoiser, SCHEDULE, Picard(tolerance=tolerance), grid, problem.start)
        )
        print(f"| {tolerance:g} | {len(sweeps)} | {error(last.x, sequential):.2g} |")


def adaptive_table(samples: int) -> None:
    """What the adaptive solver asks and errs at some tolerances, for a batch and for one sample alone."""
    print("\n| rtol = 10·atol | evaluations, batch | one sample, median | error |\n|---|---|---|---|")
    problem = problem_of(MIXTURES["images"], samples)
    exact, pair = problem.exact(), grids.trailing(SCHEDULE, 1)
    for rtol in (1e-1, 1e-2, 1e-3, 1e-4):
        solver, asked = Adaptive(rtol=rtol, atol=rtol / 10), []
        together = Counting(problem.denoiser)
        found = solve(together, SCHEDULE, solver, pair, problem.start)
        for row in range(min(samples, 15)):
            alone = Counting(problem.denoiser)
            solve(alone, SCHEDULE, solver, pair, problem.start[row : row + 1])
            asked.append(alone.asked)
        print(f"| {rtol:g} | {together.asked} | {statistics.median(asked):g} | {error(found, exact):.2g} |")


def trained_curves(folder: str, counts: Sequence[int], samples: int) -> dict[str, list[float]]:
    """The same curves on a trained model, against its own flow walked finely."""
    from carrara.model import DiffusionModel

    model = DiffusionModel.load(folder)
    condition = Condition()
    if model.class_labels is not None:
        condition = Condition(label=torch.arange(samples) % len(model.class_labels.names))
    schedule = model.schedule
    shape = (samples, *model.codec.latent_shape(model.shape))
    start = Noise(1).normal(shape) * float(schedule.sigma(schedule.final_time))
    problem = Problem(model.denoiser(), schedule, start, condition, fine_steps=200)
    with torch.no_grad():
        exact = problem.exact()
        curves = {
            f"{name}, {spacing}": [error(problem.walk(solver, SPACINGS[spacing], n), exact) for n in counts]
            for name, solver in SOLVERS.items()
            for spacing in ("log_snr", "trailing")
        }
        for name in TUNED:
            ends = [problem.along(SOLVERS[name], optimised_grid(schedule, SOLVERS[name], n)) for n in counts]
            curves[f"{name}, optimised"] = [error(end, exact) for end in ends]
    print_solvers(counts, curves)
    return curves


def draw(path: Path, title: str, counts: Sequence[int], curves: dict[str, list[float]], names: Sequence[str]) -> None:
    """Error against evaluations, both on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "carrara"  # the same bytes from the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for name in names:
        solver, _, grid = name.partition(", ")
        style = (
            {"color": f"C{list(SOLVERS).index(solver)}"} if solver in SOLVERS else {"color": "black", "linewidth": 2}
        )
        line = {"optimised": "-", "": ":", "trailing": "-."}.get(grid, "--")
        axes.plot(counts, curves[name], marker="o", markersize=3, label=name, linestyle=line, **style)
    axes.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="median error", title=title)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_ylim(top=1)
    figure.legend(fontsize=8, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--model", help="a run or its model folder: the curves on it instead of the oracle's")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # diffusers' advice on options that are left out on purpose
    torch.set_num_threads(1)
    counts = arguments.counts
    if arguments.model:
        curves = trained_curves(arguments.model, counts, min(arguments.samples, 64))
        title = f"error on {Path(arguments.model).name}"
        shown = [name for name in curves if "trailing" not in name] + ["DPM++ 2M, trailing"]
        draw(arguments.out / "solvers_trained.svg", title, counts, curves, shown)
        return
    means = oracle_tables(counts, arguments.samples)
    picard_table(arguments.samples)
    adaptive_table(arguments.samples)
    shown = [f"{name}, log_snr" for name in SOLVERS] + [f"{name}, optimised" for name in TUNED] + ["diffusers' best"]
    draw(arguments.out / "solvers_error.svg", "8 components in 64 dimensions", counts, means, shown)


if __name__ == "__main__":
    main()
