"""diffusers' deterministic schedulers as contestants: every class that takes a β table, every spacing and option that
changes its error. Used by `solvers_error.py`.

The model is asked at the scheduler's own noise level, not at its rounded timestep, which is the kinder reading. DEIS,
which ends at the last level, is closed by x̂_0 like all others, from its last call where that was made there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EpsAt = Callable[[Tensor, float, float], Tensor]
"""ε̂ of (x, a, s)."""

SPACINGS = ("leading", "linspace", "trailing")
SIGMAS: tuple[dict[str, bool], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)
IN_EDM_VARIABLES = ("Euler", "Heun", "KDPM2", "LMS")
CLASSES = {
    "DDIM": "DDIMScheduler",
    "PNDM": "PNDMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "KDPM2": "KDPM2DiscreteScheduler",
    "LMS": "LMSDiscreteScheduler",
    "DEIS": "DEISMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "DPM": "DPMSolverMultistepScheduler",
    "DPM single": "DPMSolverSinglestepScheduler",
}


@dataclass(frozen=True)
class Peer:
    """One scheduler in one setting.

    Attributes:
        family: a key of `CLASSES`.
        settings: its arguments beyond the β table.
    """

    family: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        told = [str(v) if not isinstance(v, bool) else k for k, v in self.settings.items() if v is not False]
        return " ".join([self.family, *told])

    def walk(self, betas: dict[str, Any], evaluations: int, eps_at: EpsAt, x: Tensor) -> tuple[Tensor, int]:
        """The end of the walk from x, and how often the model was asked (at most `evaluations` times)."""
        import diffusers

        scheduler = getattr(diffusers, CLASSES[self.family])(**betas, **self.settings)
        scheduler.set_timesteps(self._steps(evaluations))
        edm = self.family in IN_EDM_VARIABLES
        y = x * math.sqrt(1 + float(scheduler.sigmas[0]) ** 2) if edm else x
        for count, t in enumerate(scheduler.timesteps):
            if edm:
                scheduler.scale_model_input(y, t)
            a = 1 / math.sqrt(1 + self._ratio(scheduler, count, int(t)) ** 2)
            before, eps = y, eps_at(y * a if edm else y, a, math.sqrt(1 - a * a))
            y = scheduler.step(eps, t, y).prev_sample
        asked = len(scheduler.timesteps)
        if self.family != "DEIS":
            return y, asked
        last = 1 / math.sqrt(1 + float(scheduler.sigmas[-1]) ** 2)
        if math.isclose(last, a, rel_tol=1e-9):
            return (before - math.sqrt(1 - a * a) * eps) / a, asked
        return (y - math.sqrt(1 - last * last) * eps_at(y, last, math.sqrt(1 - last * last))) / last, asked + 1

    def _steps(self, evaluations: int) -> int:
        """How many steps the evaluations pay for."""
        if self.family in ("Heun", "KDPM2"):
            return (evaluations + 1) // 2
        respaced = any(name.startswith("use_") for name in self.settings)
        return evaluations - 1 if self.family == "PNDM" or (self.family == "DEIS" and not respaced) else evaluations

    def _ratio(self, scheduler: Any, count: int, timestep: int) -> float:
        """The noise level s/a that the scheduler means by its next call."""
        if self.family in ("DDIM", "PNDM"):
            kept = float(scheduler.alphas_cumprod[timestep])
            return math.sqrt((1 - kept) / kept)
        if self.family == "KDPM2" and not scheduler.state_in_first_order:
            return float(scheduler.sigmas_interpol[scheduler.step_index])
        if self.family in ("Heun", "KDPM2"):
            return float(scheduler.sigmas[scheduler.step_index])
        return float(scheduler.sigmas[count])


def every() -> Iterator[Peer]:
    """All contestants: some 200."""
    for spacing in SPACINGS:
        yield Peer("DDIM", {"timestep_spacing": spacing, "clip_sample": False})
        yield Peer("PNDM", {"timestep_spacing": spacing, "skip_prk_steps": True, "set_alpha_to_one": True})
        for family, sigmas in itertools.product(("Euler", "Heun", "KDPM2", "LMS"), SIGMAS):
            if sigmas and spacing != "linspace":
                continue  # the noise levels are then spaced by the option, whatever the spacing
            yield Peer(family, {"timestep_spacing": spacing, **sigmas})
    for sigmas, order in itertools.product((*SIGMAS, {"use_lu_lambdas": True}), (1, 2, 3)):
        for spacing in ("linspace",) if sigmas else SPACINGS:
            yield from _multistep(order, {"timestep_spacing": spacing, "solver_order": order, **sigmas})


def _multistep(order: int, settings: dict[str, Any]) -> Iterator[Peer]:
    lu = "use_lu_lambdas" in settings
    if not lu:
        yield Peer("DEIS", settings)
    for lower in (True, False):
        for kind in ("midpoint", "heun") if order == 2 else ("midpoint",):
            yield Peer("DPM", {**settings, "solver_type": kind, "lower_order_final": lower})
        for kind in ("bh1", "bh2") if not lu else ():
            yield Peer("UniPC", {**settings, "solver_type": kind, "lower_order_final": lower})
    if settings["timestep_spacing"] == "linspace" and not lu:
        single = {k: v for k, v in settings.items() if k != "timestep_spacing"}
        yield Peer("DPM single", {**single, "final_sigmas_type": "zero", "lower_order_final": True})
