"""How feature maps lie in memory, and which of them are stored for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NARROW = 48
"""Below so many channels, maps lie in memory as they come: on a CPU, convolutions of channels that lie side by side
round twice as coarsely, which for narrow networks, of few sums, is half of the way to 1e-5, and gain little."""


def channels_last(x: Tensor) -> Tensor:
    """The same values; images lie with their channels side by side in memory, as CPU and GPU kernels like them."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def to_memory_format(x: Tensor, channels: int) -> Tensor:
    """The same values in the memory layout that suits a network of this width."""
    return x.contiguous() if x.device.type == "cpu" and channels < NARROW else channels_last(x)


def weights_to_memory_format(network: nn.Module, channels: int) -> None:
    """Bring the weights of images' convolutions, in place, into the memory layout that suits this width on a CPU."""
    if channels >= NARROW:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def like_weights(x: Tensor, conv: nn.Module) -> Tensor:
    """The same values in the memory layout of the weights of the convolution that they go into."""
    weight: Any = conv.weight
    wide = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return channels_last(x) if wide else x.contiguous()


def maybe_checkpoint(function: Callable[..., Tensor], *inputs: Any, enabled: bool) -> Tensor:
    """The function's value; if `enabled`, what happens inside is computed again in the backward pass
    instead of being stored."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return function(*inputs)
