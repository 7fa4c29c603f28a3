"""How many images one process works on at once: as the recipe sets it, or the most that fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from carrara import distributed
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.objectives import Examples
from carrara.recipe import Training

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_MOMENTS = 2
"""Tensors of the weights' size that AdamW keeps, and which are not there yet when the search runs."""


def largest_micro_batch(
    network: nn.Module,
    forward: Callable[[nn.Module, Examples], Tensor],
    examples: Examples,
    largest: int,
    processes: Processes,
) -> tuple[int, list[str]]:
    """This process's part of the batch, halved until a forward and a backward pass fit into memory on every process.

    Args:
        network: plain, not over several processes: each process tries on its own.
        forward: the forward pass.
        examples: some of the data, on the device.
        largest: where the search begins, this process's part of the batch.

    Returns:
        The size, and a sentence for every one that did not fit.

    Raises:
        UserError: not even one image fits.
    """
    size, notices = largest, []
    while size and not _fits(network, forward, examples, size):
        notices.append(f"a micro-batch of {size} images does not fit into memory.")
        size //= 2
    size = int(distributed.gather(torch.tensor([size], device=processes.device)).min())
    if size == 0:
        raise UserError(
            "not even one image fits into memory: choose a smaller network or resolution, or set "
            "network.checkpointing=true.",
            key="training.micro_batch",
            code="resources",
        )
    return size, notices


def refuse_sharded(training: Training, processes: Processes) -> None:
    """Raises UserError if the weights are sharded, so that no process can try sizes on its own."""
    if processes.world > 1 and training.parallel == "fsdp":
        raise UserError(
            "training.micro_batch=auto tries sizes on each process alone, which sharded weights do not allow: "
            "give a number with training.parallel=fsdp.",
            key="training.micro_batch",
            code="conflict",
        )


def _fits(network: nn.Module, forward: Callable[[nn.Module, Examples], Tensor], examples: Examples, size: int) -> bool:
    images = examples.x0
    rows = torch.arange(size, device=images.device) % len(images)
    try:
        ballast = [torch.empty_like(p) for p in network.parameters() for _ in range(_MOMENTS)]
        forward(network, Examples(images[rows], examples.condition.rows(rows))).square().mean().backward()
        del ballast
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)):
            raise
        gc.collect()  # the traceback held what did not fit
        if images.device.type == "cuda":
            torch.cuda.empty_cache()
        return False
    finally:
        network.zero_grad(set_to_none=True)
    return True
