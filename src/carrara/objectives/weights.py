"""The weight of each noise level, for every kind of prediction.

The papers define a weight for the error of x̂_0 or of ε̂; here it multiplies the error of what the network predicts.
With c = (error of x̂_0)/(error of the network's output), from the table in `process.parameterisation`:

| weight    | on ‖x_0 - x̂_0‖²                | predicts ε         | predicts x_0      | predicts v (VP)        |
|-----------|--------------------------------|--------------------|-------------------|------------------------|
| `uniform` | 1/c²                           | 1                  | 1                 | 1                      |
| `min_snr` | min(SNR, γ)                    | min(SNR, γ)/SNR    | min(SNR, γ)       | min(SNR, γ)/(SNR + 1)  |
| `p2`      | SNR/(1 + SNR)                  | 1/(1 + SNR)        | SNR/(1 + SNR)     | SNR/(1 + SNR)²         |
| `edm`     | (r² + σ_d²)/(r σ_d)², r = σ/α  | (r² + σ_d²)/σ_d²   | as on the left    | as on the left · σ²    |

For the flow velocity (α + σ = 1), min_snr is min(SNR, γ)/(1 + √SNR)²; for EDM's F, `edm` is 1. Where no signal is left,
min_snr and p2 are 1 for ε and 0 for every other kind: `floor` keeps that level trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from carrara.errors import UserError, nearest
from carrara.process.parameterisation import SIGMA_DATA, Predicts, edm_norm, posterior_coefficients
from carrara.process.schedules import Schedule

WeightKind = Literal["uniform", "min_snr", "p2", "edm"]


@dataclass(frozen=True)
class Weight:
    """The weight of a level on the squared error of what the network predicts.

    Attributes:
        kind: "uniform" (L_simple), "min_snr" (Hang et al. 2023), "p2" (Choi et al. 2022 with k = γ = 1) or "edm"
            (Karras et al. 2022, table 1).
        gamma: γ of min_snr.
        floor: no level weighs less.
    """

    kind: WeightKind = "uniform"
    gamma: float = 5.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(WeightKind):
            sentence = f"there is no weight '{self.kind}': {nearest(self.kind, get_args(WeightKind))}"
            raise UserError(sentence, key="objective.weight.kind", code="unknown")
        if not (self.gamma > 0 and self.floor >= 0):
            raise UserError("a weight needs gamma above 0 and a floor of at least 0.", key="objective.weight")

    def __call__(self, predicts: Predicts, schedule: Schedule, times: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
        """float64, of the shape of `times` [B]; finite at every time but the clean point."""
        if self.kind == "uniform":
            return torch.ones_like(times, dtype=torch.float64).clamp(min=self.floor)
        # Tiny instead of 0, so that the limits at zero SNR come out of the same formulas.
        alpha, sigma = schedule.alpha(times).clamp(min=1e-150), schedule.sigma(times)
        gain = _gain(predicts, schedule, times, alpha, sigma, sigma_data)
        if self.kind == "min_snr":
            value = torch.minimum(alpha**2, self.gamma * sigma**2) * gain
        elif self.kind == "p2":
            value = alpha**2 * sigma**2 / (alpha**2 + sigma**2) * gain
        else:
            value = edm_norm(alpha, sigma, sigma_data) / sigma_data**2 * gain
        return value.clamp(min=self.floor)


def _gain(
    predicts: Predicts, schedule: Schedule, times: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> Tensor:
    """(error of x̂_0 / error of the network's output)² / σ²."""
    if predicts == "eps":
        return alpha**-2
    if predicts == "x0":
        return sigma**-2
    if predicts == "v":
        return (alpha**2 + sigma**2) ** -2
    if predicts == "flow":
        return (alpha + sigma) ** -2
    if predicts == "edm":
        return sigma_data**2 / torch.as_tensor(edm_norm(alpha, sigma, sigma_data))
    _, c_0 = posterior_coefficients(schedule, times, times.double())
    return (sigma * torch.as_tensor(c_0)) ** -2
