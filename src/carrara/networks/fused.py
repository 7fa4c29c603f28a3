"""Faster forms of two pairs of layers: norm and activation, up-sampling and convolution.

Their results and gradients are those of the plain layers, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from carrara.devices import HALF

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_PLAIN: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

_DOUBLING = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
"""Takes three weights w to those of the flipped kernel convolved with [1, 1]: [w₂, w₂ + w₁, w₁ + w₀, w₀]."""

FEW_POSITIONS = 64
"""In a map of fewer positions, making the doubled kernel costs more than it spares. (Decided by the map alone: the
numbers of a sample must not depend on the batch that it is in.)"""


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """SiLU(GN(x)), or SiLU(GN(x)·(1 + scale) + shift), [B, C, *S], as one step.

    Args:
        norm: GN.
        x: [B, C, *S].
        scale, shift: [B, C], of adaptive group norm.
    """
    stored = torch.is_grad_enabled() and (x.device.type != "cpu" or x.dtype in HALF)
    if stored or torch.compiler.is_compiling():
        # The plain layers, for an accelerator's own kernels, for half types (which store little), and for the
        # compiler, which fuses them itself.
        h = norm(x)
        if scale is not None and shift is not None:
            h = torch.addcmul(column(shift, h), h, 1 + column(scale, h))
        return F.silu(h)
    gain, offset = norm.weight[None], norm.bias[None]
    if scale is not None and shift is not None:
        gain, offset = gain * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
    if torch.is_grad_enabled():
        return NormSiLU.apply(x, gain, offset, norm.num_groups, norm.eps)  # type: ignore[no-any-return]
    precise = x.float() if x.dtype in HALF else x
    return _group_norm_silu(precise, gain.to(precise), offset.to(precise), norm.num_groups, norm.eps)[0].to(x.dtype)


def _group_norm_silu(x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
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
        torch.addcmul(column(offset, y), y, column(gain, y), out=y)
    return F.silu(y, inplace=True), mean, rstd


class NormSiLU(torch.autograd.Function):
    """`NormSiLU.apply(x, gain, offset, groups, eps)`: SiLU(GN(x)·gain + offset), storing x alone for its gradient.

    PyTorch's three layers store x, GN(x) and the scaled map. Here the map is computed again from x, which spares a
    training step of the U-Net a quarter of its peak memory (`benchmarks/unet.py`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = _group_norm_silu(x, gain, offset, groups, eps)
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
        d = torch.addcmul(column(offset - m * r * gain, x), x, column(r * gain, x))  # y
        torch.ops.aten.silu_backward.grad_input(gradient, d, grad_input=d)
        if len(gain) == 1:  # PyTorch's own backward pass knows one gain for the whole batch, and is faster
            shape = (len(x), x.shape[1], math.prod(x.shape[2:]), groups)
            wanted = [True, True, True]
            d_x, d_gain, d_offset = torch.ops.aten.native_group_norm_backward(d, x, mean, rstd, gain[0], *shape, wanted)
            return d_x, d_gain[None], d_offset[None], None, None
        axes = tuple(range(2, x.ndim))
        work: Tensor = d * x
        with_x, alone = work.sum(axes), d.sum(axes)  # Σ d·x, Σ d over the positions, [B, C]
        d_gain, d_offset = (with_x - alone * m) * r, alone
        count = each * math.prod(x.shape[2:])

        def total(value: Tensor) -> Tensor:
            """Σ over each group's channels, again [B, C]."""
            sums: Tensor = (value * gain).reshape(-1, groups, each).sum(2)
            return sums.repeat_interleave(each, dim=1)

        of_x = (total(alone) * m - total(with_x)) * r**3 / count
        constant = -of_x * m - total(alone) * r / count
        torch.addcmul(column(constant, x), x, column(of_x, x), out=work)
        d_x = work.addcmul_(d, column(r * gain, x))
        return d_x, d_gain, d_offset, None, None


def column(value: Tensor, x: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, …], to broadcast against x."""
    return value.reshape(*value.shape, *[1] * (x.ndim - 2))


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 3-convolution of x repeated to twice its size, without the repeated map.

    Each output sees two input neighbours along an axis, not three. So this is a transposed convolution of
    stride 2, whose kernel is the flipped one convolved with [1, 1]: 4/9 of the multiplications for images.

    Args:
        x: [B, C, *S].
        weight: [C', C, 3, …], the convolution's.
        bias: [C'].

    Returns:
        [B, C', *2S] (of three dimensions, the first keeps its size).
    """
    dims = weight.ndim - 2
    strides = (1, 2, 2) if dims == 3 else (2,) * dims
    if math.prod(x.shape[2:]) < FEW_POSITIONS:
        repeated = F.interpolate(x, scale_factor=tuple(map(float, strides)), mode="nearest")
        return _PLAIN[dims](repeated, weight, bias, padding=1)
    return _TRANSPOSED[dims](x, _doubled(weight), bias, strides, 1)


def _doubled(weight: Tensor) -> Tensor:
    """The kernel [C, C', 4, …] of that transposed convolution, in the memory format of the weight."""
    if weight.ndim == 3:
        line: Tensor = weight @ _DOUBLING.to(weight)
        return line.transpose(0, 1)
    taps = torch.kron(_DOUBLING, _DOUBLING).to(weight)
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        kernel: Tensor = taps.T @ weight.permute(1, 2, 3, 0).flatten(1, 2)  # [C, 16, C']
        return kernel.reshape(len(kernel), 4, 4, -1).permute(0, 3, 1, 2)
    if weight.ndim == 5:  # frames are not doubled, but the operation is transposed
        weight = weight.flip(2)
    kernel = weight.flatten(-2) @ taps
    return kernel.reshape(*kernel.shape[:-1], 4, 4).transpose(0, 1)
