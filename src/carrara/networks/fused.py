"""SiLU(GN(x)·gain + offset) as one step: in place, and keeping only x for the backward pass.

PyTorch's three layers keep x, GN(x) and the scaled map. Here the map is made again from x, which spares a training
step of the U-Net a quarter of its peak memory (`benchmarks/unet.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def norm_silu(x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU(x̂·gain + offset), x̂ = (x - m)·r normalised over each group, without a gradient.

    Args:
        x: float32 or float64 [B, C, *S].
        gain, offset: [B, C], or [1, C] for the whole batch.
        groups, eps: see `torch.nn.GroupNorm`.

    Returns:
        The map [B, C, *S]; m and r, [B, groups].
    """
    shape = (len(x), x.shape[1], math.prod(x.shape[2:]), groups, eps)
    if len(gain) == 1:
        y, mean, rstd = torch.native_group_norm(x, gain[0], offset[0], *shape)
    else:
        y, mean, rstd = torch.native_group_norm(x, None, None, *shape)
        torch.addcmul(_column(offset, y), y, _column(gain, y), out=y)
    return F.silu(y, inplace=True), mean, rstd


class NormSiLU(torch.autograd.Function):
    """`NormSiLU.apply(x, gain, offset, groups, eps)`: `norm_silu` with its gradient, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = norm_silu(x, gain, offset, groups, eps)
        ctx.save_for_backward(x, gain, offset, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = (x - m)·r, y = x̂·gain + offset, and d = ∂L/∂y:
        ∂L/∂x = r·(d·gain - E[d·gain] - x̂·E[d·gain·x̂]), E the mean over a group."""
        x, gain, offset, mean, rstd = ctx.saved_tensors
        groups = mean.shape[1]
        each = x.shape[1] // groups
        m, r = (value.repeat_interleave(each, dim=1) for value in (mean, rstd))  # [B, C]
        d = torch.addcmul(_column(offset - m * r * gain, x), x, _column(r * gain, x))  # y
        torch.ops.aten.silu_backward.grad_input(gradient, d, grad_input=d)
        if len(gain) == 1:  # PyTorch's own backward pass knows one gain for the whole batch, and is faster
            shape = (len(x), x.shape[1], math.prod(x.shape[2:]), groups)
            wanted = [True, True, True]
            d_x, d_gain, d_offset = torch.ops.aten.native_group_norm_backward(d, x, mean, rstd, gain[0], *shape, wanted)
            return d_x, d_gain[None], d_offset[None], None, None
        places = tuple(range(2, x.ndim))
        work: Tensor = d * x
        with_x, alone = work.sum(places), d.sum(places)  # Σ d·x, Σ d over the places, [B, C]
        d_gain, d_offset = (with_x - alone * m) * r, alone
        count = each * math.prod(x.shape[2:])

        def total(value: Tensor) -> Tensor:
            """Σ over each group's channels, again [B, C]."""
            sums: Tensor = (value * gain).reshape(-1, groups, each).sum(2)
            return sums.repeat_interleave(each, dim=1)

        of_x = (total(alone) * m - total(with_x)) * r**3 / count
        constant = -of_x * m - total(alone) * r / count
        torch.addcmul(_column(constant, x), x, _column(of_x, x), out=work)
        d_x = work.addcmul_(d, _column(r * gain, x))
        return d_x, d_gain, d_offset, None, None


def _column(value: Tensor, x: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, …], to broadcast against x."""
    return value.reshape(*value.shape, *[1] * (x.ndim - 2))
