"""Whether `torch.compile` can work on this machine, known before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carrara.errors import UserError


class _Probe(nn.Linear):
    """A layer of our own, since those of PyTorch alone are not compiled; its product needs generated code."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin() * x


def check_compiler(device: torch.device) -> None:
    """Raises UserError unless a module can be compiled for the device: Inductor needs a C++ compiler on CPUs, Triton
    and a C compiler on GPUs. A small layer is compiled to find out."""
    probe = _Probe(2, 2).to(device)
    probe.compile()
    try:
        probe(torch.ones(1, 2, device=device)).sum().backward()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"training.compile=true needs a working compiler for {device.type} ({lines[0] if lines else error!r}): "
            "install one (g++ on Debian and Ubuntu), or set training.compile=false.",
            key="training.compile",
            code="unsupported",
        ) from None
