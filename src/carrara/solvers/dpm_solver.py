"""DPM-Solver++ in the data-prediction form, multistep and singlestep, as an ODE and as an SDE (Lu et al. 2022).

With ℓ = ln(a/s), half the log-SNR, h = ℓ_s - ℓ_t and D a combination of known x̂_0,

    x_s = (s_s/s_t) e^{-ηh} x_t + a_s (1 - e^{-(1+η)h}) D + s_s √(1 - e^{-2ηh}) z.

η = 0 is the probability-flow ODE (DPM-Solver++ eq. 14), η = 1 the diffusion SDE (its appendix, "SDE-DPM-Solver++").
e^{-h} is the ratio (s_s a_t)/(s_t a_s), so that the clean point and zero SNR (both h = ∞) need no exception.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step, combine, needs_descent
from carrara.solvers.exponential import History, decay, exact_weights, half_log_snr, halved_weights, moments


@dataclass(frozen=True)
class DPMSolver:
    """Multistep DPM-Solver++: "2M", "3M", and with eta > 0 their SDE forms. One evaluation a step.

    The first steps, for want of history, the step into the clean point and the step from zero SNR fall back to
    the order they can have. Order 1 is DDIM with the same η.

    Attributes:
        order: 1, 2 or 3.
        eta: 0 is the ODE, 1 the SDE.
        solver_type: how order 2 weighs the slope: "midpoint" (the paper's algorithm 2) or "heun" (integrated
            exactly); k-diffusion's and diffusers' words.
        published: order 3 as it was printed and is run elsewhere, where the second difference lacks a factor 2,
            which makes it a second-order method. By default the factor is there.
    """

    order: int = 2
    eta: float = 0.0
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    published: bool = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UserError(f"DPM-Solver++ multistep has the orders 1, 2 and 3, not {self.order}.", key="order")
        if not 0 <= self.eta <= 1:
            raise UserError(f"DPM-Solver++'s eta lies in 0..1, {self.eta:g} does not.", key="eta")
        if self.solver_type not in ("midpoint", "heun"):
            raise UserError(
                f"DPM-Solver++'s solver_type is 'midpoint' or 'heun', not '{self.solver_type}'.",
                key="solver_type",
                code="unknown",
            )

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return min(self.order, 2) if self.published else self.order

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.eta > 0

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return ()  # ((ℓ, x̂_0), …) of the last steps, newest first

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        prediction = denoise(x, transition.t).folded()
        here = half_log_snr(transition.alpha_t, transition.sigma_t)
        known: History = ((here, prediction.x0), *state)[: self.order]
        shrink = decay(transition)
        keep = shrink**self.eta  # e^{-ηh}
        if shrink == 0:
            weights = [1 - keep * shrink]
        else:
            weights = self._weights(-math.log(shrink), [place - here for place, _ in known])
        values = [value for _, value in known]
        x_s = combine(
            x * (transition.sigma_s / transition.sigma_t * keep), values, [transition.alpha_s * w for w in weights]
        )
        if self.eta > 0 and transition.sigma_s > 0:
            x_s = torch.add(x_s, noise.like(x), alpha=transition.sigma_s * math.sqrt(1 - keep**2))
        return Step(x_s, prediction, known if math.isfinite(here) else (), transition.s)

    def _weights(self, h: float, places: list[float]) -> list[float]:
        """The weights of the known x̂_0; with η > 0 time runs (1 + η) times as fast in the exponential."""
        rate = 1 + self.eta
        nodes = [place / h for place in places]
        if len(nodes) == 2 and self.solver_type == "midpoint":
            return halved_weights(-math.expm1(-rate * h), rate * h, nodes[1])
        weights = exact_weights(rate * h, nodes)
        if len(nodes) == 3 and self.published:
            # The exact rule holds ∫ e^{-(h-τ)} (τ/h)² dτ times the second divided difference: print keeps half of it.
            half = moments(rate * h, 3)[2] / 2
            u0, u1, u2 = nodes
            weights[0] -= half / ((u0 - u1) * (u0 - u2))
            weights[1] -= half / ((u1 - u0) * (u1 - u2))
            weights[2] -= half / ((u2 - u0) * (u2 - u1))
        return weights


@dataclass(frozen=True)
class DPMSolver2S:
    """Singlestep DPM-Solver++(2S) [Lu et al. 2022, algorithm 1, r = 1/2]: two evaluations a step, no history.

    With eta > 0 the step aims at the lower noise √(s_s² - σ²) and adds σ z, σ as in DDIM (k-diffusion's
    "dpmpp_2s_ancestral"). Into the clean point and from zero SNR it is of order 1, with one evaluation.

    Attributes:
        eta: 0..1.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"DPM-Solver++(2S)'s eta lies in 0..1, {self.eta:g} does not.", key="eta")

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return 2

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.eta > 0

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return None

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        prediction = denoise(x, transition.t).folded()
        sigma = self.eta * math.sqrt(transition.posterior_variance)
        target = replace(transition, sigma_s=math.sqrt(max(transition.sigma_s**2 - sigma**2, 0.0)))
        shrink = decay(target)
        data = prediction.x0
        if shrink > 0:
            here = half_log_snr(transition.alpha_t, transition.sigma_t)
            middle = float(transition.schedule.time_at(2 * here - math.log(shrink)))
            half = Transition.of(transition.schedule, transition.t, middle)
            x_m = torch.add(x * (half.sigma_s / half.sigma_t), data, alpha=half.alpha_s * (1 - decay(half)))
            data = denoise(x_m, middle).folded().x0
        x_s = torch.add(x * (target.sigma_s / transition.sigma_t), data, alpha=transition.alpha_s * (1 - shrink))
        if sigma > 0:
            x_s = torch.add(x_s, noise.like(x), alpha=sigma)
        return Step(x_s, prediction, None, transition.s)
