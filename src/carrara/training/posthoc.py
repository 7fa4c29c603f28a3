"""A mean of any width from the means that a run stored: EDM2's post-hoc re-weighting.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", §3.2 and appendix C. A stored
mean of exponent γ at step t has the profile p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t]. The wanted profile is
approximated by the linear combination of the stored ones that is nearest in the sense of ∫ (…)² dτ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.training.ema import PowerFunction


@dataclass(frozen=True)
class Profile:
    """How much the weights of each step count in a mean taken at step `step`.

    Attributes:
        gamma: the exponent γ.
        step: t.
    """

    gamma: float
    step: float

    def dot(self, other: Profile) -> float:
        """∫ p q dτ; with t_p ≤ t_q this is (γ_p + 1)(γ_q + 1)/((γ_p + γ_q + 1) t_q) · (t_p/t_q)^γ_q."""
        early, late = (self, other) if self.step <= other.step else (other, self)
        scale = (early.gamma + 1) * (late.gamma + 1) / ((early.gamma + late.gamma + 1) * late.step)
        return float(scale * (early.step / late.step) ** late.gamma)


def coefficients(stored: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """The combination of the stored profiles that is nearest to the wanted one, float64 [len(stored)]."""
    products = np.array([[p.dot(q) for q in stored] for p in stored])
    # Relative to the profiles' own lengths: those of early steps are far longer than those of late ones.
    lengths = np.sqrt(np.diag(products))
    target = np.array([p.dot(wanted) for p in stored])
    solution = np.linalg.lstsq(products / np.outer(lengths, lengths), target / lengths, rcond=1e-13)[0]
    result: NDArray[np.float64] = solution / lengths
    return result


def reweighted(run: str | Path, sigma_rel: float, step: int | None = None) -> DiffusionModel:
    """The model of a finished run with another width of the mean.

    Args:
        run: a run folder whose recipe had `training.power_ema` with two widths or more.
        sigma_rel: the width that is wanted, above 0 and below 0.28.
        step: when the mean is taken; None is the last snapshot.

    Raises:
        UserError: the run stored no such means, or none up to that step.
    """
    snapshots = Path(run) / "snapshots"
    if not Path(run).is_dir():
        raise UserError(
            f"there is no run folder {run}: give one whose recipe had training.power_ema.", key="run", code="missing"
        )
    files = sorted(snapshots.glob("step-*/power-*.safetensors"))
    found = {path: (int(path.parent.name.removeprefix("step-")), _width(path)) for path in files}
    if not found:
        raise UserError(
            f"{run} stored no power-function means: train with training.power_ema=[0.05, 0.1] "
            "and training.power_ema_every.",
            key="training.power_ema",
            code="missing",
        )
    if not 0 < sigma_rel < 0.28:
        raise UserError(f"a relative width lies above 0 and below 0.28, {sigma_rel:g} does not.", key="sigma_rel")
    last = max(at for at, _ in found.values()) if step is None else step
    used = {path: Profile(PowerFunction(width).gamma, at) for path, (at, width) in found.items() if at <= last}
    if not used:
        raise UserError(
            f"{run} stored no means up to step {last}: the first are of step {min(found.values())[0]}.",
            key="step",
            code="missing",
        )
    weights_of_means = coefficients(list(used.values()), Profile(PowerFunction(sigma_rel).gamma, last))
    model = DiffusionModel.load(run)
    model.network.load_state_dict(_combined(list(used), weights_of_means))
    model.origin = f"power-function mean of width {sigma_rel:g} at step {last}, from {len(used)} snapshots"
    return model


def _width(path: Path) -> float:
    return float(path.name.removeprefix("power-").removesuffix(".safetensors"))


def _combined(files: Sequence[Path], weights_of_means: NDArray[np.float64]) -> dict[str, Tensor]:
    """Σ coefficient · weights, in float64 and then rounded; one tensor at a time, so that few are in memory."""
    total: dict[str, Tensor] = {}
    for path, factor in zip(files, weights_of_means.tolist(), strict=True):
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_tensor(key).double() * factor
                total[key] = total[key].add_(part) if key in total else part
    return {key: value.float() for key, value in total.items()}
