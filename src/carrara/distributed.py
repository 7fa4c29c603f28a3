"""Processes that work together: the only importer of `torch.distributed`.

Training, sampling and evaluation share it. One process is the plain case and needs no launcher; `torchrun` and
`accelerate launch` set the same environment variables (RANK, WORLD_SIZE, LOCAL_RANK).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: 0..world-1; rank 0 writes.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0


def start() -> Processes:
    """Join the group that a launcher made, or be alone: NCCL on GPUs, gloo on CPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world)
    return Processes(rank, world, device)


def gather(values: Tensor) -> Tensor:
    """The values of all processes one after the other, in rank order, [world·B, …]; the values themselves where
    there is one process. Every process must call it, with equal shapes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
