"""The one loop along a grid, and what a solver is: one pure step with explicit state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser, Prediction
from carrara.process.schedules import Schedule, Time
from carrara.process.transitions import Transition

Denoise = Callable[[Tensor, Time], Prediction]
"""A denoiser with its condition bound: `denoise(x, t) -> Prediction`."""

State = Any
"""A solver's state between steps: None, or (nested) tuples of floats, strings and tensors, so that
`torch.save` and `torch.load(weights_only=True)` keep it. Never changed in place."""


@dataclass(frozen=True)
class Step:
    """What one step yields.

    Attributes:
        x: the image at `time`, [B, …].
        prediction: the prediction that the step was made from (at its start, for methods of several stages).
        state: the solver's state after the step.
        time: where it arrived, in schedule time.
        index: the number of the pair, from 0.
        total: the number of pairs of the grid.
        setting: what is integrated: solver, times and seed.
    """

    x: Tensor
    prediction: Prediction
    state: State
    time: float
    index: int = 0
    total: int = 1
    setting: Mapping[str, Any] = field(default_factory=dict)

    def checkpoint(self) -> dict[str, Any]:
        """What `integrate(..., resume=…)` needs to continue after this step: plain data and tensors, which
        `torch.save` and `torch.load(weights_only=True)` keep."""
        return {"x": self.x, "state": self.state, "index": self.index, **self.setting}


class Solver(Protocol):
    """One pure step from t to s. A solver is a frozen dataclass of its options; all memory is in `state`.

    Neither method changes its arguments, and neither turns gradients off: the caller decides.

    Attributes:
        convergence_order: p of the global error O(hᵖ) on the probability-flow ODE, for small steps h in ℓ.
        stochastic: whether a step draws noise.
    """

    @property
    def convergence_order(self) -> int: ...

    @property
    def stochastic(self) -> bool: ...

    def start(self, x: Tensor, grid: Grid) -> State:
        """The state before the first pair of `grid`."""
        ...

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        """From x at the transition's time t to its time s.

        Args:
            denoise: evaluated as often as the method needs.
            transition: t, s and their coefficients; s > t on a reversed grid, where the method allows it.
            x: [B, …] at time t; never changed.
            state: what `start` or the last step returned.
            noise: bound to this step's draw: `noise.like(x)`, `noise.like(x, sub=1)` …
        """
        ...


def bound(denoiser: Denoiser, condition: Condition) -> Denoise:
    """The denoiser with its condition; no frame of ours stands between where its parameter has the protocol's name."""
    try:
        named = "condition" in signature(denoiser).parameters
    except (TypeError, ValueError):
        named = False
    return partial(denoiser, condition=condition) if named else lambda x, t: denoiser(x, t, condition)


def needs_descent(grid: Grid) -> None:
    """Refuse a reversed grid on behalf of the solvers that cannot invert.

    Raises:
        UserError: the grid ascends.
    """
    if grid.ascending:
        raise UserError(
            "this solver integrates from noise to image only: invert a reversed grid with DDIM(eta=0).",
            key="solver",
            code="unsupported",
        )


def combine(x: Tensor, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """x + Σ_j weights[j]·values[j]; values beyond the weights are left out."""
    for value, weight in zip(values, weights, strict=False):
        x = torch.add(x, value, alpha=weight)
    return x


def finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity, by its sum: a tenth of the cost of looking at every number."""
    return math.isfinite(float(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))))


class NonFinite(UserError, ArithmeticError):
    """A prediction held NaN or infinity; the sentence names the step and the time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, key="prediction", code="not_finite")


def integrate(
    denoiser: Denoiser,
    schedule: Schedule,
    solver: Solver,
    grid: Grid,
    x: Tensor,
    condition: Condition | None = None,
    noise: Noise | None = None,
    *,
    after_step: Callable[[Step], Tensor] | None = None,
    resume: Mapping[str, Any] | None = None,
) -> Iterator[Step]:
    """Integrate from x along `grid` and yield every step: previews, progress, cancelling are the caller's `for` loop.

    In half precision the solver works in float32, and only what is yielded is rounded.

    Args:
        denoiser: what is known at each time; guides are already wrapped around it.
        schedule: the denoiser's schedule.
        solver: the method.
        grid: the times. `grid.reversed()` inverts.
        x: the image at the grid's first time, [B, …]: pure noise times s(T) for sampling.
        condition: what the model is conditioned on (nothing by default).
        noise: addressed randomness; step i uses draw i + 1, draw 0 being the starting noise.
        after_step: called with each step; the tensor it returns takes the place of `step.x` (inpainting's
            known pixels).
        resume: the `checkpoint` of the last step of an interrupted integration with the same solver, grid and seed; it
            continues after it, and `x` is not read.

    Raises:
        NonFinite: a prediction held NaN or infinity.
        UserError: the grid leaves the schedule, or `resume` is of another solver, grid or seed.
    """
    schedule.check(grid.times)
    condition = condition or Condition()
    noise = noise or Noise()
    setting = {"solver": repr(solver), "times": grid.times.tolist(), "seed": noise.seed}
    first, state = 0, solver.start(x, grid)
    if resume is not None:
        _check_resume(resume, setting)
        first, x, state = resume["index"] + 1, resume["x"], resume["state"]
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    denoise, pairs = bound(denoiser, condition), grid.pairs()
    for index in range(first, len(pairs)):
        t, s = pairs[index]
        transition = Transition.of(schedule, t, s, pairs[index - 1][0] if index else None)
        step = solver.step(denoise, transition, x, state, noise.at(index + 1))
        if not finite(step.x):
            raise NonFinite(
                f"the prediction of step {index + 1} of {len(pairs)}, from t = {t:g} to {s:g}, is not finite: "
                "look at the model's weights, the guidance scale and the precision."
            )
        step = replace(step, index=index, total=len(pairs), setting=setting)
        if after_step is not None:
            step = replace(step, x=after_step(step).to(x.dtype))
        x, state = step.x, step.state
        yield step if dtype == x.dtype else replace(step, x=x.to(dtype))


def _check_resume(resume: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
    """Raises UserError unless a checkpoint is of the same solver, grid and seed."""
    for key, value in setting.items():
        if resume.get(key) != value:
            found = f"{len(resume[key]) - 1} steps" if key == "times" and key in resume else repr(resume.get(key))
            raise UserError(
                f"resume was made with another {'grid' if key == 'times' else key} ({found}): resume with the same, or "
                "start again.",
                key=f"resume.{key}",
                code="mismatch",
            )


def solve(
    denoiser: Denoiser,
    schedule: Schedule,
    solver: Solver,
    grid: Grid,
    x: Tensor,
    condition: Condition | None = None,
    noise: Noise | None = None,
    *,
    after_step: Callable[[Step], Tensor] | None = None,
) -> Tensor:
    """The last x of `integrate`, [B, …] at the grid's last time."""
    for step in integrate(denoiser, schedule, solver, grid, x, condition, noise, after_step=after_step):
        x = step.x
    return x
