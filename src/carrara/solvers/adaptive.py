"""A third-order method that chooses its own steps from an error tolerance (Bogacki & Shampine 1989).

It works in the variables of the flow, z = x/(a + s) and τ = s/(a + s), where every schedule's path is
dz/dτ = ε̂ - x̂_0 and both ends are finite: τ = 1 is zero SNR, τ = 0 the clean point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.prediction import Prediction
from carrara.process.schedules import Schedule, level
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step, combine, needs_descent

_MOST_SUBSTEPS = 10_000
_FIRST_SHARE = 0.05  # of the remaining way: the first sub-step of all


@dataclass(frozen=True)
class Adaptive:
    """Bogacki-Shampine 3(2) with sub-steps inside each pair, three evaluations each and one more a transition.

    Every sample has its own step size, so that a picture does not depend on its batch; the batch is evaluated
    together until its last sample is done. A pair that ends clean is integrated to the schedule's `first_time`
    and closed by x = a_s x̂_0. From a table's zero-SNR end the first sub-step is Euler's, to the next level.

    Attributes:
        rtol, atol: a sub-step is accepted where the root mean square of error/(atol + rtol·|z|) is at most 1.
    """

    rtol: float = 1e-2
    atol: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise UserError("the adaptive solver needs tolerances rtol, atol ≥ 0 that are not both 0.", key="rtol")

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return 3

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return False

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return torch.full((x.shape[0],), torch.nan, dtype=torch.float64)  # each sample's next step size in τ

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        first = denoise(x, transition.t).folded()
        prediction = first
        schedule, t = transition.schedule, transition.t
        a_t, s_t, clean = transition.alpha_t, transition.sigma_t, transition.sigma_s == 0
        end = min(schedule.first_time, t) if clean else transition.s
        if a_t == 0 and schedule.discrete:
            t -= 1  # a table has no levels between its zero-SNR end and the next
            a_t, s_t = level(schedule, t)
            x = torch.add(prediction.x0 * a_t, prediction.eps, alpha=s_t)
            prediction = denoise(x, t).folded()
        x0 = prediction.x0
        if end < t:
            substeps = _SubSteps(self, denoise, schedule, end)
            x, x0, state = substeps.run(x / (a_t + s_t), s_t / (a_t + s_t), prediction, state)
        return Step(transition.alpha_s * x0 if clean else x, first, state, transition.s)


@dataclass(frozen=True)
class _SubSteps:
    """The sub-steps of one pair, down to the time `end`."""

    tolerance: Adaptive
    denoise: Denoise
    schedule: Schedule
    end: float

    def run(self, z: Tensor, start: float, known: Prediction, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From z at τ = start: x at the end, x̂_0 there, and the step sizes to go on with."""
        a, s = level(self.schedule, self.end)
        target = s / (a + s)
        tau = torch.full_like(sizes, start)
        sizes = torch.where(sizes.isnan(), _FIRST_SHARE * (tau - target), sizes)
        x0, slope = known.x0, _slope(known)
        for _ in range(_MOST_SUBSTEPS):
            remaining = tau - target
            if not bool((remaining > 0).any()):
                return z * (a + s), x0, sizes
            size = torch.minimum(sizes, remaining)
            x_s, last, error = self._substep(z, tau, size, slope)
            scale = self.tolerance.atol + self.tolerance.rtol * torch.maximum(z.detach().abs(), x_s.detach().abs())
            norm = (error / scale).flatten(1).pow(2).mean(1).sqrt().to("cpu", torch.float64)
            if not bool(norm.isfinite().all()):
                return torch.full_like(z, torch.nan), last.x0, sizes  # `integrate` stops and names the step
            accept, moving = norm <= 1, remaining > 0
            factor = (0.9 * norm.clamp(min=1e-12) ** (-1 / 3)).clamp(0.2, 5)
            # A sub-step cut short by the end of the pair is no measure of the next one: it never shrinks it.
            cut = accept & (sizes > remaining)
            sizes = torch.where(moving, torch.where(cut, sizes, size * factor), sizes)
            tau = torch.where(accept & moving, torch.where(size < remaining, tau - size, target), tau)
            rows = (accept & moving).to(z.device).reshape(-1, *[1] * (z.ndim - 1))
            z, slope = torch.where(rows, x_s, z), torch.where(rows, _slope(last), slope)
            x0 = torch.where(rows, last.x0, x0)
        raise UserError(
            f"the adaptive solver needs more than {_MOST_SUBSTEPS} sub-steps down to t = {self.end:g}: "
            "loosen rtol and atol, or integrate in float64.",
            key="rtol",
            code="not_finite",
        )

    def _substep(self, z: Tensor, tau: Tensor, size: Tensor, k1: Tensor) -> tuple[Tensor, Prediction, Tensor]:
        step = -size.to(z).reshape(-1, *[1] * (z.ndim - 1))
        k2 = _slope(self._predict(z + step / 2 * k1, tau - size / 2))
        k3 = _slope(self._predict(z + step * 3 / 4 * k2, tau - size * 3 / 4))
        x_s = z + step * combine(k1 * (2 / 9), (k2, k3), (1 / 3, 4 / 9))
        last = self._predict(x_s, tau - size)
        with torch.no_grad():
            error = step * combine(k1 * (-5 / 72), (k2, k3, _slope(last)), (1 / 12, 1 / 9, -1 / 8))
        return x_s, last, error

    def _predict(self, z: Tensor, tau: Tensor) -> Prediction:
        """The prediction for every sample at its own τ: a/s = (1 - τ)/τ."""
        times = self.schedule.time_at(2 * ((1 - tau).log() - tau.log())).clamp(min=self.end)
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        x = z * (alpha + sigma).to(z).reshape(-1, *[1] * (z.ndim - 1))
        return self.denoise(x, times.to(z.device)).folded()


def _slope(prediction: Prediction) -> Tensor:
    return prediction.eps - prediction.x0
