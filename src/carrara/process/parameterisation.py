"""What networks predict: ε, x_0, v, flow velocity, EDM's F, mean of x_{t-1}; to and from (x_0, ε) (docs/math.md §3).

With x = a x_0 + s ε at the noise level (a, s):

| kind       | target of the network               | x̂_0                     | error of x̂_0 / its error  |
|------------|-------------------------------------|-------------------------|---------------------------|
| `eps`      | ε                                   | (x - s ε)/a             | s/a                       |
| `x0`       | x_0                                 | x_0                     | 1                         |
| `v`        | a ε - s x_0                         | (a x - s v)/(a² + s²)   | s/(a² + s²)               |
| `flow`     | ε - x_0                             | (x - s u)/(a + s)       | s/(a + s)                 |
| `edm`      | F = (s x_0 - a σ_d² ε)/(σ_d √n)     | c_skip x + c_out F      | c_out                     |
| `previous` | c_t x + c_0 x_0, the posterior mean | (x_{t-1} - c_t x)/c_0   | 1/c_0                     |

where n = s² + a² σ_d², and c_skip and c_out are EDM's, see `edm_coefficients`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.process.prediction import Prediction, Scale, scales
from carrara.process.schedules import Schedule, Time
from carrara.process.transitions import Transition

Predicts = Literal["eps", "x0", "v", "flow", "edm", "previous"]

SIGMA_DATA = 0.5
"""EDM's σ_data, the standard deviation of the data that its preconditioning presumes (Karras et al. 2022, table 1)."""


def edm_norm(alpha: Scale, sigma: Scale, sigma_data: float = SIGMA_DATA) -> Scale:
    """n = s² + a² σ_d², the variance of a noisy image whose clean one has the standard deviation σ_d."""
    return sigma**2 + (alpha * sigma_data) ** 2


def edm_coefficients(alpha: Scale, sigma: Scale, sigma_data: float = SIGMA_DATA) -> tuple[Scale, Scale, Scale]:
    """c_skip, c_out and c_in of x̂_0 = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, eq. 7 and table 1).

    Theirs are for x/a at the noise level s/a; multiplied out they hold where a or s vanishes. c_noise, a quarter of the
    noise level's logarithm, is the EDM schedule's `network_time`.
    """
    norm = edm_norm(alpha, sigma, sigma_data)
    c_skip = alpha * sigma_data**2 / norm
    c_out = sigma * sigma_data / norm**0.5
    c_in = 1 / norm**0.5
    return c_skip, c_out, c_in


def network_input(predicts: Predicts, x: Tensor, alpha: Scale, sigma: Scale, sigma_data: float = SIGMA_DATA) -> Tensor:
    """What the network is shown: x, or for EDM's F c_in x, of standard deviation one."""
    return x * edm_coefficients(alpha, sigma, sigma_data)[2] if predicts == "edm" else x


def posterior_coefficients(schedule: Schedule, t: Time, x: Tensor) -> tuple[Scale, Scale]:
    """(c_t, c_0) of the training neighbours: the mean of q(x_{t-1}|x_t, x_0) is c_t x_t + c_0 x_0 (docs/math.md §2).

    Args:
        t: whole times of a table, one or [B].
        x: [B, …], which the coefficients are to multiply.

    Raises:
        UserError: a time between the levels, which has no neighbour.
    """
    times = torch.as_tensor(t, dtype=torch.float64)
    if times.device.type == "cpu" and bool((times != times.floor()).any()):
        raise UserError(
            "a network that predicts the previous image knows whole times only: use a grid of whole times.",
            key="time",
            code="unsupported",
        )
    # In float64 until the end: σ²_{t|s} is a small difference of numbers near one.
    wide = x.new_empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=torch.float64)
    transition = Transition.per_sample(schedule, times, times - 1, wide)
    return transition.x_coefficient.to(x.dtype), transition.x0_coefficient.to(x.dtype)


def to_prediction(
    predicts: Predicts,
    schedule: Schedule,
    x: Tensor,
    t: Time,
    raw: Tensor,
    fraction: Tensor | None = None,
    sigma_data: float = SIGMA_DATA,
) -> Prediction:
    """x̂_0 and ε̂ from what the network predicted.

    Args:
        x: the noisy image, [B, …].
        t: schedule time, one or [B].
        raw: the network's answer, [B, …].
        fraction: its raw variance fraction, [B, …], handed on.
        sigma_data: EDM's σ_data.

    Raises:
        UserError: ε where no signal is left, x_0 where there is no noise: see `x0_of_eps`, `eps_of_x0`.
    """
    a, s = scales(schedule, t, x)
    if predicts == "eps":
        return Prediction.from_eps(x, raw, a, s, variance_fraction=fraction)
    if predicts == "x0":
        return Prediction.from_x0(x, raw, a, s, variance_fraction=fraction)
    if predicts == "previous":
        c_t, c_0 = posterior_coefficients(schedule, t, x)
        return Prediction.from_x0(x, (raw - c_t * x) / c_0, a, s, variance_fraction=fraction)
    # The others rotate (x, raw) into (x_0, ε) and divide by neither a nor s: they hold at both ends.
    if predicts == "v":
        norm = a**2 + s**2
        x0, eps = (a * x - s * raw) / norm, (s * x + a * raw) / norm
    elif predicts == "flow":
        norm = a + s
        x0, eps = (x - s * raw) / norm, (x + a * raw) / norm
    else:
        c_skip, c_out, _ = edm_coefficients(a, s, sigma_data)
        norm = edm_norm(a, s, sigma_data)
        x0 = x * c_skip + raw * c_out
        eps = x * (s / norm) - raw * (a * sigma_data / norm**0.5)
    return Prediction(x, a, s, x0, eps, variance_fraction=fraction)


def target(
    predicts: Predicts, schedule: Schedule, x0: Tensor, eps: Tensor, t: Time, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """What a perfect network predicts for x = a x_0 + s ε, [B, …]: `to_prediction`'s inverse.

    Args:
        x0, eps: [B, …].
        t: schedule time, one or [B].
        sigma_data: EDM's σ_data.
    """
    a, s = scales(schedule, t, x0)
    if predicts == "eps":
        return eps
    if predicts == "x0":
        return x0
    if predicts == "v":
        return a * eps - s * x0
    if predicts == "flow":
        return eps - x0
    if predicts == "edm":
        return (s * x0 - (a * sigma_data**2) * eps) * (1 / (sigma_data * edm_norm(a, s, sigma_data) ** 0.5))
    c_t, c_0 = posterior_coefficients(schedule, t, x0)
    return c_t * (a * x0 + s * eps) + c_0 * x0
