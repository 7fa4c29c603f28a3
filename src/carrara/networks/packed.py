"""Convolutions whose weights are brought into the CPU library's order once for a sampling run, not at every step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_run = threading.local()

_ONE_SMALL_MAP = 20480
"""PyTorch computes a single map of no more numbers by its own kernel, which rounds otherwise."""

_MOST_BYTES = 2**30
"""Of copies; the weights of a larger network are packed as far as that goes."""

_Shape = tuple[int, ...]
_Packed = dict[nn.Conv2d, tuple[_Shape, Tensor]]


@contextmanager
def packed_weights() -> Iterator[None]:
    """While it lasts, this thread's convolutions keep their packed weights: no weight may change meanwhile.

    The results are the same to the last bit. A second copy of the convolutions' weights is held, on CPUs alone, of up
    to 1 GiB.
    """
    outer = getattr(_run, "packed", None)
    _run.packed = {}
    try:
        yield
    finally:
        _run.packed = outer


class Convolution2d(nn.Conv2d):
    """PyTorch's, which knows `packed_weights`; of stride and dilation 1, in one group."""

    def forward(self, x: Tensor) -> Tensor:
        packed: _Packed | None = getattr(_run, "packed", None)
        if packed is None or torch.compiler.is_compiling() or not self._can_pack(x):
            return super().forward(x)
        known = packed.get(self)
        if known is None and sum(module.weight.nbytes for module in packed) + self.weight.nbytes > _MOST_BYTES:
            return super().forward(x)
        if known is None or known[0] != x.shape:
            known = packed[self] = (tuple(x.shape), self._pack(x.shape))
        where = (self.padding, self.stride, self.dilation, self.groups)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(x, known[1], self.bias, *where, "none", [], "")
        return result

    def _can_pack(self, x: Tensor) -> bool:
        """Whether PyTorch would compute this by oneDNN too, which the other orders and types are not certain of."""
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and self.kernel_size != (1, 1)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
            and (len(x) > 1 or x.numel() > _ONE_SMALL_MAP)
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()
        )

    def _pack(self, shape: torch.Size) -> Tensor:
        pack: Any = torch._C._nn
        where = (self.padding, self.stride, self.dilation, self.groups)
        packed: Tensor = pack.mkldnn_reorder_conv2d_weight(self.weight.detach().to_mkldnn(), *where, list(shape))
        return packed
