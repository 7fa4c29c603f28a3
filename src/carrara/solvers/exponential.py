"""What the exponential multistep methods share: DPM-Solver++ and UniPC (Lu et al. 2022, Zhao et al. 2023).

With ℓ = ln(a/s), half the log-SNR, and h = ℓ_s - ℓ_t the flow from t to s is exactly

    x_s = (s_s/s_t) x_t + a_s ∫₀ʰ e^{-(h-τ)} x̂_0(ℓ_t + τ) dτ,

so a method is a rule that turns a few known x̂_0 into weights of this integral. Everything here is plain floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from carrara.process.transitions import Transition

History = tuple[tuple[float, Tensor], ...]
"""Known values and the places ℓ (or ρ) where they were taken, newest first."""

Rule = Literal["midpoint", "heun"]


def half_log_snr(alpha: float, sigma: float) -> float:
    """ℓ = ln(α/σ): +inf at the clean point, -inf where no signal is left."""
    if alpha == 0 or sigma == 0:
        return -math.inf if alpha == 0 else math.inf
    return math.log(alpha / sigma)


def decay(transition: Transition[float]) -> float:
    """e^{-h} = (σ_s α_t)/(σ_t α_s), in [0, 1]: 0 into the clean point and from zero SNR, where h = ∞."""
    return (transition.sigma_s * transition.alpha_t) / (transition.sigma_t * transition.alpha_s)


def moments(h: float, count: int) -> list[float]:
    """M_k = ∫₀ʰ e^{-(h-τ)} (τ/h)^k dτ for k = 0..count-1, h > 0.

    By parts M_k = 1 - (k/h) M_{k-1}; below h = 1, where that cancels, by the series h Σ_n (-h)^n k!/(k+n+1)!.
    """
    if h < 1:
        terms = [[(-h) ** n * math.factorial(k) / math.factorial(k + n + 1) for n in range(18)] for k in range(count)]
        return [h * math.fsum(series) for series in terms]
    values = [-math.expm1(-h)]
    for k in range(1, count):
        values.append(1 - k / h * values[-1])
    return values


def interpolatory(nodes: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """The weights w with Σ_j w_j u_j^k = integrals[k]: they integrate exactly the polynomial through the nodes u_j."""
    powers = np.vander(np.asarray(nodes), increasing=True).T
    weights: list[float] = np.linalg.solve(powers, np.asarray(integrals)).tolist()
    return weights


def exact_weights(h: float, nodes: Sequence[float]) -> list[float]:
    """Weights of ∫₀ʰ e^{-(h-τ)} p(τ) dτ, p the polynomial through values at τ = nodes, for nodes in units of h."""
    return interpolatory(nodes, moments(h, len(nodes)))


def halved_weights(scale: float, h: float, node: float) -> list[float]:
    """Two-point weights with the published simplification: the slope's weight is scale/2 instead of its integral.

    `scale` is 1 - e^{-h} in DPM-Solver++ ("midpoint") and in UniPC's B2, h in UniPC's B1.

    Args:
        node: the second value's place in units of h: negative for a past one, 1 for the corrector's.
    """
    slope = scale / (2 * node)
    return [-math.expm1(-h) - slope, slope]
