"""Two self-tests of a recipe on this machine: can it learn at all, and where does its time go?"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from carrara.data import Batch, LatentBatch
from carrara.training.loop import Trainer

GOAL = 0.1
"""The self-test is passed when the loss has fallen to this share of the first step's."""


def overfit_one_batch(trainer: Trainer, steps: int = 500) -> Iterator[tuple[int, float]]:
    """Train on the first batch again and again, with the same noise levels and the same noise.

    A network that can learn learns that by heart. Ends when the loss has fallen to `GOAL` of its first value, or
    after `steps` steps. Nothing is written.

    Yields:
        The step (from 1) and its loss as a share of the first.
    """
    batch = trainer.batches.at(0)
    first = 0.0
    for step in range(1, steps + 1):
        examples = trainer.examples(batch)
        loss = float(trainer.stepper.step(examples, batch.positions, step - 1)[0].loss)
        first = first or loss
        yield step, loss / first
        if not loss > GOAL * first:
            return


def profile_steps(trainer: Trainer, steps: int = 10, warm_up: int = 3) -> dict[str, Any]:
    """Where the time of some steps goes. Nothing is written.

    Returns:
        `images_per_s`, `flops_per_s`, `seconds_per_step`, the `shares` of the phases, `peak_memory_mb`, and the ten
        most expensive `operations` with their shares of the time within operations.
    """
    batches: Iterator[Batch | LatentBatch] = trainer.batches.iterate(0)
    for _ in range(warm_up):
        trainer.one_step(next(batches))
    trainer.phases.seconds.clear()
    began = trainer.phases.clock()
    for _ in range(steps):
        with trainer.phases("reading data"):
            batch = next(batches)
        trainer.one_step(batch)
    passed = trainer.phases.clock() - began
    speed = steps * trainer.recipe.training.batch_size / passed
    shares = {name: round(seconds / passed, 4) for name, seconds in trainer.phases.seconds.items()}
    return {
        "images_per_s": round(speed, 2),
        "flops_per_s": round(speed * trainer.flops_per_image),
        "seconds_per_step": round(passed / steps, 4),
        "shares": shares,
        "peak_memory_mb": round(_peak_bytes(trainer.processes.device) / 1e6),
        "operations": _operations(trainer, batch),
    }


def _operations(trainer: Trainer, batch: Any) -> dict[str, float]:
    """Shares of the time within PyTorch's operations during one more step."""
    cuda = trainer.processes.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        trainer.one_step(batch)
    times = {e.key: float(e.self_device_time_total if cuda else e.self_cpu_time_total) for e in record.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=lambda name: times[name], reverse=True)[:10]
    return {name: round(times[name] / total, 4) for name in largest}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
