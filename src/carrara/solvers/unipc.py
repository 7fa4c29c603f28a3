"""UniPC: a predictor and a free corrector of the same family, for one evaluation a step (Zhao et al. 2023).

The prediction made at (x, t) serves twice: the corrector UniC-p puts it into the integral that led to x, which
raises the order of x to p + 1, and the predictor UniP-p goes on from there. Corrector and predictor share the
linear part of `exponential`, so the correction is a combination of known x̂_0 alone: nothing but x̂_0 is kept, and
what `after_step` did to x in between (inpainting) is respected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from carrara.errors import UserError
from carrara.process.grids import Grid
from carrara.process.noise import Noise
from carrara.process.transitions import Transition
from carrara.solvers.base import Denoise, State, Step, combine, needs_descent
from carrara.solvers.exponential import History, decay, exact_weights, half_log_snr, halved_weights


@dataclass(frozen=True)
class UniPC:
    """UniPC-p, of order p + 1; without its corrector UniP-p, of order p.

    The first steps use the order that the history allows. The step into the clean point is x = a_s x̂_0, the step
    from zero SNR is of order 1 and stays uncorrected.

    Attributes:
        order: p, 1 to 3.
        variant: "B1" (B(h) = h) or "B2" (B(h) = e^h - 1). It matters in the two-point rules alone (UniP-2 and UniC-1):
            in the others B cancels, and UniP-3 is the corrected DPM-Solver++(3M).
        corrector: False leaves UniP.
    """

    order: int = 2
    variant: Literal["B1", "B2"] = "B2"
    corrector: bool = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise UserError(f"UniPC has the orders 1, 2 and 3, not {self.order}.", key="order")
        if self.variant not in ("B1", "B2"):
            raise UserError(f"UniPC's variant is 'B1' or 'B2', not '{self.variant}'.", key="variant", code="unknown")

    @property
    def convergence_order(self) -> int:
        """Of the global error in the step size, on the probability-flow ODE."""
        return self.order + self.corrector

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return False

    def start(self, x: Tensor, grid: Grid) -> State:
        needs_descent(grid)
        return ()  # ((ℓ, x̂_0), …) of the last steps, newest first

    def step(self, denoise: Denoise, transition: Transition[float], x: Tensor, state: State, noise: Noise) -> Step:
        prediction = denoise(x, transition.t).folded()
        here = half_log_snr(transition.alpha_t, transition.sigma_t)
        past: History = state
        if self.corrector and past:
            x = self._correct(x, transition.alpha_t, (here, prediction.x0), past)
        known: History = ((here, prediction.x0), *past)[: self.order]
        shrink = decay(transition)
        weights = [1.0] if shrink == 0 else self._weights(-math.log(shrink), [place - here for place, _ in known])
        values = [value for _, value in known]
        x_s = combine(x * (transition.sigma_s / transition.sigma_t), values, [transition.alpha_s * w for w in weights])
        return Step(x_s, prediction, known if math.isfinite(here) else (), transition.s)

    def _correct(self, x: Tensor, alpha: float, new: tuple[float, Tensor], past: History) -> Tensor:
        """x with the last step's integral taken again, the value at its end now being known."""
        origin = past[0][0]
        h = new[0] - origin
        places = [place - origin for place, _ in past]
        predicted = self._weights(h, places)
        corrected = self._weights(h, [*places, h])
        change = [after - before for after, before in zip(corrected, [*predicted, 0.0], strict=True)]
        return combine(x, [*[value for _, value in past], new[1]], [alpha * w for w in change])

    def _weights(self, h: float, places: list[float]) -> list[float]:
        nodes = [place / h for place in places]
        if len(nodes) == 2:
            return halved_weights(h if self.variant == "B1" else -math.expm1(-h), h, nodes[1])
        return exact_weights(h, nodes)
