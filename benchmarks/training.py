"""Training side by side with a minimal loop around diffusers' U-Net, and what Carrara's own loop waits for.

    python benchmarks/training.py [--parts speed start memory stall] [--data ../shared/data/cifar10] [--repeats 5]

The peer is written as diffusers' official unconditional example does it: a `datasets` transform, a DataLoader, a
DDPMScheduler's `add_noise`, AdamW, a clipped gradient, an EMAModel. Competitors run in turn in one process with the
same threads, batch and nearly the same number of parameters; only the ratio of their medians is a claim.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from carrara.recipe import load
from carrara.training import Trainer

PARTS = ["speed", "start", "memory", "stall"]
QUIET = ("training.tracker=none", "training.sample_every=1000000", "training.checkpoint_every=1000000")


def ours(data: Path, folder: Path, *changes: str) -> Trainer:
    """The shipped recipe for cifar10, without previews."""
    return Trainer(load("cifar10", [f"data.path={data}", *QUIET, *changes]), folder)


def theirs(data: Path, batch_size: int, workers: int) -> tuple[int, Iterator[float]]:
    """The peer's number of parameters, and its endless training, which yields losses."""
    from datasets import load_dataset
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        dropout=0.1,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=11,
    )
    files = [str(path) for path in sorted(data.rglob("*train*.parquet"))]
    rows = load_dataset("parquet", data_files=files, split="train")
    image, label = (next(n for n in rows.column_names if n in names) for names in (("img", "image"), ("label",)))

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [np.asarray(picture.convert("RGB"), np.float32) / 127.5 - 1 for picture in batch[image]]
        return {"input": [torch.from_numpy(p).permute(2, 0, 1) for p in pixels], "label": batch[label]}

    rows.set_transform(transform)
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    mean = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)

    def train() -> Iterator[float]:
        network.train()
        while True:
            for batch in loader:
                clean = batch["input"]
                noise = torch.randn_like(clean)
                times = torch.randint(0, 1000, (len(clean),))
                told = network(scheduler.add_noise(clean, noise, times), times, class_labels=batch["label"]).sample
                loss = F.mse_loss(told, scheduler.get_velocity(clean, noise, times))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                mean.step(network.parameters())
                yield float(loss.detach())

    return sum(p.numel() for p in network.parameters()), train()


def seconds(steps: Iterator[Any], count: int) -> float:
    """How long `count` steps take."""
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.perf_counter() - began


def speed(data: Path, repeats: int, steps: int, batch_size: int, folder: Path) -> None:
    trainer = ours(data, folder / "speed", "training.steps=1000000", f"training.batch_size={batch_size}")
    mine = trainer.steps()
    parameters, peer = theirs(data, batch_size, workers=0)
    print(
        f"parameters: {trainer.size:,} here, {parameters:,} there; "
        f"batch {batch_size}; {torch.get_num_threads()} threads"
    )
    seconds(mine, 2)
    seconds(peer, 2)
    before = trainer.phases.seconds["reading data"]
    here, there = [], []
    for _ in range(repeats):
        here.append(steps * batch_size / seconds(mine, steps))
        there.append(steps * batch_size / seconds(peer, steps))
    own = sum(steps * batch_size / value for value in here)
    waited = trainer.phases.seconds["reading data"] - before
    ratios = [a / b for a, b in zip(here, there, strict=True)]
    print(f"images/s: {statistics.median(here):.1f} here, {statistics.median(there):.1f} there")
    print(
        f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
        f"n = {repeats}, {steps} steps each)"
    )
    print(f"waiting for data: {waited / own:.2%} of the time")
    mine.close()  # type: ignore[attr-defined]


def start(data: Path, repeats: int, folder: Path) -> None:
    """From the recipe to the end of the first step, imports done."""
    times = []
    for turn in range(repeats):
        began = time.perf_counter()
        steps = ours(data, folder / f"start{turn}", "training.steps=10").steps()
        next(steps)
        times.append(time.perf_counter() - began)
        steps.close()  # type: ignore[attr-defined]
    print(
        f"start to first step: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f}, n = {repeats})"
    )


def memory(folder: Path, steps: int = 5000) -> None:
    """The peak of this process's memory after 1/5, 2/5, … of many small steps."""
    small = ["network.channels=8", "network.head_channels=8", "training.batch_size=16", f"training.steps={steps}"]
    peaks = [
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for progress in Trainer(load("digits", [*QUIET, *small]), folder / "memory").steps()
        if progress.step % (steps // 5) == 0 and progress.notice is None
    ]
    print("peak memory:", ", ".join(f"{peak:,.1f}" for peak in peaks), f"MB after each fifth of {steps} steps")


def stall(folder: Path, repeats: int) -> None:
    """How long a checkpoint of about 100 million parameters keeps training from its next step."""
    large = ["network.channels=264", "network.blocks_per_level=3", "network.head_channels=66", "training.batch_size=8"]
    trainer = Trainer(load("digits", [*QUIET, *large]), folder / "stall")
    times, writes = [], []
    for turn in range(repeats):
        trainer.one_step(trainer.batches.at(turn))
        began = time.perf_counter()
        trainer.save_checkpoint()
        times.append(time.perf_counter() - began)
        trainer.writer.wait()
        writes.append(time.perf_counter() - began)
    print(
        f"{trainer.size:,} parameters: training stands still for {statistics.median(times):.2f} s "
        f"(at most {max(times):.2f})"
    )
    print(f"written after {statistics.median(writes):.1f} s, n = {repeats}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in given.parts:
            speed(given.data, given.repeats, given.steps, given.batch_size, folder)
        if "start" in given.parts:
            start(given.data, given.repeats, folder)
        if "memory" in given.parts:
            memory(folder)
        if "stall" in given.parts:
            stall(folder, given.repeats)


if __name__ == "__main__":
    main()
