"""Parallel-in-time sampling by Picard iteration (Shih et al. 2023, "ParaDiGMS"): the second loop, which evaluates
the denoiser at many times at once.

DDIM's step is x_{i+1} = A_i x_i + B_i x̂_0(x_i) + σ_i z_i. Given a guess of all x_i of a window, one evaluation of the
batch of all of them gives every x̂_0, and the recurrence gives a better guess. The first point of a window is exact,
so each sweep makes at least one more exact; where the path is nearly straight, many. The result is that of
sequential DDIM with the same noise, within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Denoiser, Prediction
from carrara.process.schedules import Schedule, level
from carrara.process.transitions import Transition
from carrara.solvers.base import NonFinite, Step, combine, finite, needs_descent


@dataclass(frozen=True)
class Picard:
    """How `integrate_parallel` works.

    Attributes:
        eta: DDIM's η, 0..1.
        window: how many steps are evaluated at once; memory grows with it. None takes the whole grid.
        tolerance: a point is settled where the root mean square of its change is at most tolerance·s, s being
            the noise level it comes from, for every sample. 0 repeats sequential DDIM to the last bits.
    """

    eta: float = 0.0
    window: int | None = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not (0 <= self.eta <= 1 and self.tolerance >= 0 and (self.window is None or self.window >= 1)):
            raise UserError(
                "parallel sampling needs eta in 0..1, a window of at least 1 and a tolerance ≥ 0.", key="window"
            )

    def coefficients(self, transition: Transition[float]) -> tuple[float, float, float]:
        """A, B and σ of the step x_s = A x_t + B x̂_0 + σ z."""
        sigma = self.eta * math.sqrt(transition.posterior_variance)
        keep = math.sqrt(max(transition.sigma_s**2 - sigma**2, 0.0)) / transition.sigma_t
        return keep, transition.alpha_s - keep * transition.alpha_t, sigma


def integrate_parallel(
    denoiser: Denoiser,
    schedule: Schedule,
    method: Picard,
    grid: Grid,
    x: Tensor,
    condition: Condition | None = None,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Integrate from x along `grid`, many steps at once; a `Step` is yielded after each sweep that settles some.

    Args:
        denoiser: called with x of [window·B, …] and t of [window·B].
        x: [B, …] at the grid's first time.
        condition: one for the batch of B; it is repeated along the window.
        noise: the same addresses as `integrate`'s: step i uses draw i + 1.

    Raises:
        NonFinite: a prediction held NaN or infinity.
    """
    needs_descent(grid)
    schedule.check(grid.times)
    noise = noise or Noise()
    batch, pairs = x.shape[0], grid.pairs()
    condition = (condition or Condition()).batch(batch)
    steps = [method.coefficients(Transition.of(schedule, t, s)) for t, s in pairs]
    width = min(method.window or len(pairs), len(pairs))
    done, points = 0, [x] * (width + 1)  # the guesses at the times done..done + width
    while done < len(pairs):
        count = len(points) - 1
        times = torch.tensor([t for t, _ in pairs[done : done + count]], dtype=torch.float64, device=x.device)
        repeated = condition.map(lambda v, n=count: v.repeat(n, *[1] * (v.ndim - 1)))  # type: ignore[misc]
        prediction = denoiser(torch.cat(points[:-1]), times.repeat_interleave(batch), repeated).folded()
        fresh = [points[0]]
        for i, x0 in enumerate(prediction.x0.split(batch)):
            keep, data, sigma = steps[done + i]
            arrived = combine(fresh[-1] * keep, [x0], [data])
            if sigma > 0:
                arrived = torch.add(arrived, noise.at(done + i + 1).like(x), alpha=sigma)
            fresh.append(arrived)
        if not all(finite(f) for f in fresh[1:]):
            raise NonFinite(f"a prediction of the steps {done + 1} to {done + count} of {len(pairs)} is not finite.")
        levels = [level(schedule, t)[1] for t, _ in pairs[done : done + count]]
        settled = _settled(points, fresh, [method.tolerance * s for s in levels])
        done += settled
        rows = _rows(prediction, slice((settled - 1) * batch, settled * batch))
        yield Step(fresh[settled], rows, None, pairs[done - 1][1], done - 1, len(pairs))
        tail = fresh[settled:]
        points = tail + [tail[-1]] * (min(width, len(pairs) - done) + 1 - len(tail))


def solve_parallel(
    denoiser: Denoiser,
    schedule: Schedule,
    method: Picard,
    grid: Grid,
    x: Tensor,
    condition: Condition | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """The last x of `integrate_parallel`, [B, …] at the grid's last time."""
    for step in integrate_parallel(denoiser, schedule, method, grid, x, condition, noise):
        x = step.x
    return x


def _settled(before: list[Tensor], after: list[Tensor], tolerances: list[float]) -> int:
    """How many points of the window need no further sweep: the first after the start, which is exact, and those
    behind it as long as no sample of them changed by more than the tolerance."""
    for i in range(2, len(after)):
        change = (after[i] - before[i]).detach().flatten(1).pow(2).mean(1).sqrt().max()
        if float(change) > tolerances[i - 1]:
            return i - 1
    return len(after) - 1


def _rows(prediction: Prediction, rows: slice) -> Prediction:
    """The prediction of some rows of the batch."""
    own = {f.name: getattr(prediction, f.name) for f in fields(prediction)}
    return replace(prediction, **{name: v[rows] for name, v in own.items() if isinstance(v, Tensor)})
