"""Where and how precisely a network computes: the words of `--device` and `--precision`."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from carrara.errors import UserError, nearest

Precision = Literal["fp32", "bf16", "fp16"]
HALF = (torch.float16, torch.bfloat16)
"""The number types of half precision."""

_STAGED_BYTES = 2**15
"""CUDA's driver stages copies up to 64 KiB by itself; larger ones wait unless the memory is pinned."""


def resolve_device(word: str = "auto") -> torch.device:
    """The device behind a word: "auto" is a CUDA device where there is one, else Apple's GPU, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(word)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # PyTorch built without CUDA asserts
        raise UserError(
            f"there is no device '{word}' here: use auto or cpu.", key="device", code="unsupported"
        ) from None
    return device


def resolve_precision(word: str, device: torch.device) -> Precision:
    """The number type behind a word: "auto" is bf16 on CUDA devices that compute in it natively, else fp32.

    A CPU stays at fp32, so that its results do not depend on the processor.

    Raises:
        UserError: an unknown word, or one that this device cannot compute in.
    """
    known = get_args(Precision)
    word = {"no": "fp32"}.get(word, word)  # as other programs spell it
    if word not in ("auto", *known):
        raise UserError(
            f"there is no precision '{word}': {nearest(word, ('auto', *known))}", key="precision", code="unknown"
        )
    if word == "auto":
        return "bf16" if device.type == "cuda" and _native_bf16(device) else "fp32"
    if word == "bf16" and not _native_bf16(device):
        raise UserError(f"the device {device} does not compute in bf16: use fp32.", key="precision", code="unsupported")
    return cast(Precision, word)


def _native_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 without emulation; every CPU can, slowly or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device).add(1)
    except (RuntimeError, TypeError):
        return False
    return True


def to_device(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Values on a device; where they come from the host, it does not wait for what a CUDA device is still computing."""
    waits = values.device.type != "cpu" or torch.device(device).type != "cuda"
    if not waits and values.nbytes > _STAGED_BYTES:
        values = values.pin_memory()
    return values.to(device, dtype or values.dtype, non_blocking=not waits)


def compute_in(network: nn.Module, precision: Precision, device: torch.device) -> None:
    """Let the network's forward pass compute at this precision, in place; its output is float32 in any case."""
    if precision == "fp32":
        return
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    forward = network.forward

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*args, **kwargs).float()

    network.forward = autocast
