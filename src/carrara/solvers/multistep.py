"""Multistep methods on ε̂: LMS (k-diffusion), DEIS (Zhang & Chen 2023) and PLMS (Liu et al. 2022, "PNDM").

In y = x/a and ρ = s/a the flow is dy/dρ = ε̂, so x_s = (a_s/a_t) x_t + a_s Σ_j w_j ε̂_j. LMS integrates the polynomial
in ρ through the last ε̂, DEIS the polynomial in ln ρ; PLMS presumes even steps in ρ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step, combine, needs_descent
from carrara.solvers.euler import euler_step
from carrara.solvers.exponential import History, exact_weights, interpolatory

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights for even steps, newest value first, by the number of values."""


@dataclass(frozen=True)
class LMS:
    """Adams-Bashforth for uneven steps: the polynomial through the last ε̂ in ρ is integrated exactly.

    The first steps, for want of history, the step into the clean point and the step from zero SNR fall back to the
    order they can have. One evaluation a step.

    Attributes:
        order: 1 to 4.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if self.order not in ADAMS_BASHFORTH:
            raise UserError(f"LMS has the orders 1 to 4, not {self.order}.", key="order")

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return self.order

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return False

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return ()  # ((ρ, ε̂), …) of the last steps, newest first

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        prediction = denoise(x, transition.t).folded()
        if transition.alpha_t == 0 or transition.sigma_s == 0:
            return Step(euler_step(prediction, transition), prediction, state, transition.s)
        rho, target = transition.sigma_t / transition.alpha_t, transition.sigma_s / transition.alpha_s
        known: History = ((rho, prediction.eps), *state)[: self.order]
        weights = self.weights([place for place, _ in known], target)
        x_s = combine(
            x * (transition.alpha_s / transition.alpha_t),
            [value for _, value in known],
            [transition.alpha_s * w for w in weights],
        )
        return Step(x_s, prediction, known, transition.s)

    def weights(self, places: list[float], target: float) -> list[float]:
        """The weights of ∫ ε̂ dρ from places[0] to target, of values known at `places`."""
        width = target - places[0]
        nodes = [(place - places[0]) / width for place in places]
        return [width * w for w in interpolatory(nodes, [1 / (k + 1) for k in range(len(nodes))])]


@dataclass(frozen=True)
class DEIS(LMS):
    """Exponential Adams-Bashforth: as LMS, with the polynomial in ln ρ ("tAB-DEIS" in log-ρ, DPM-Solver's variable).

    Attributes:
        order: 1 to 4.
    """

    order: int = 3

    def weights(self, places: list[float], target: float) -> list[float]:
        # With ρ = places[0]·e^{-τ} the integral is -places[0] ∫₀ʰ e^{-τ} p(τ) dτ: `exact_weights` seen from its end.
        h = math.log(places[0] / target)
        mirrored = [1 - math.log(places[0] / place) / h for place in places]
        return [-places[0] * w for w in exact_weights(h, mirrored)]


@dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep: Adams-Bashforth weights for even steps, whatever the grid, of order 4.

    Exactly fourth order only where ρ = s/a falls in even steps; on smooth grids otherwise second order. The first
    step takes the mean of ε̂ at both ends (two evaluations), as latent diffusion and diffusers do; from zero
    SNR it is of order 1. Into the clean point x = a_s x̂_0.
    """

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size: 2, as its weights presume even steps in ρ (4 where they are)."""
        return 2

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return False

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return ()  # the last ε̂, newest first

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        prediction = denoise(x, transition.t).folded()
        if transition.alpha_t == 0 or transition.sigma_s == 0:
            return Step(euler_step(prediction, transition), prediction, state, transition.s)
        known: tuple[Tensor, ...] = (prediction.eps, *state)[:4]
        values, weights = known, ADAMS_BASHFORTH[len(known)]
        if len(known) == 1:
            values = (prediction.eps, denoise(euler_step(prediction, transition), transition.s).folded().eps)
            weights = (1 / 2, 1 / 2)
        change = transition.sigma_s - transition.sigma_t * (transition.alpha_s / transition.alpha_t)  # a_s (ρ_s - ρ_t)
        x_s = combine(x * (transition.alpha_s / transition.alpha_t), values, [change * w for w in weights])
        return Step(x_s, prediction, known, transition.s)
