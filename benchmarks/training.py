"""Training side by side with a minimal loop around diffusers' U-Net, and what Carrara's own loop waits for.

    python -m benchmarks.training [--parts speed start memory stall] [--data ../shared/data/cifar10]

The peer is written as diffusers' official unconditional example does it: a `datasets` transform, a DataLoader in the
same process, a DDPMScheduler's `add_noise`, AdamW, a clipped gradient, an EMAModel. The networks are the same
architecture with the same number of weights. Competitors take turns step by step in one process with the same
threads and batch; only the median of the paired ratios is a claim.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from carrara.cli import keep_freed_memory
from carrara.recipe import load
from carrara.training import Progress, Trainer

PARTS = ("speed", "start", "memory", "stall")
QUIET = ("training.tracker=none", "training.sample_every=1000000", "training.checkpoint_every=1000000")
PLAIN = (
    "conditioning.kind=none",
    "sampling.guidance=1",
    "network.dropout=0",
    "network.adaptive_norm=false",
    "network.resampling=convolution",
    "network.head_channels=64",
)
"""The recipe for cifar10 with the architecture of diffusers' U-Net."""


def ours(data: Path, folder: Path, *changes: str) -> Trainer:
    """The shipped recipe for cifar10, without previews."""
    return Trainer(load("cifar10", [f"data.path={data}", *QUIET, *changes]), folder)


def theirs(data: Path, batch_size: int) -> tuple[int, Iterator[float]]:
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
        attention_head_dim=64,
    )
    files = [str(path) for path in sorted(data.rglob("*train*.parquet"))]
    rows = load_dataset("parquet", data_files=files, split="train")
    image = next(name for name in rows.column_names if name in ("img", "image"))

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [np.asarray(picture.convert("RGB"), np.float32) / 127.5 - 1 for picture in batch[image]]
        return {"input": [torch.from_numpy(p).permute(2, 0, 1) for p in pixels]}

    rows.set_transform(transform)
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, shuffle=True, num_workers=0, drop_last=True)
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
                told = network(scheduler.add_noise(clean, noise, times), times).sample
                loss = F.mse_loss(told, scheduler.get_velocity(clean, noise, times))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                mean.step(network.parameters())
                yield float(loss.detach())

    return sum(p.numel() for p in network.parameters()), train()


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def middle(values: list[float], unit: str = "") -> str:
    """Median, quartiles and number of some values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.2f}{unit} (quartiles {low:.2f} to {high:.2f}, n = {len(values)})"


def speed(data: Path, folder: Path, pairs: int, batch_size: int) -> None:
    """Images per second from the encoded picture to the updated mean, beside the peer's."""
    trainer = ours(data, folder, "training.steps=1000000", f"training.batch_size={batch_size}", *PLAIN)
    mine = trainer.steps()
    parameters, peer = theirs(data, batch_size)
    assert abs(parameters / trainer.size - 1) < 0.02, f"{trainer.size} parameters here, {parameters} there"
    for _ in range(2):
        next(mine)
        next(peer)
    before, here, there = trainer.phases.seconds.copy(), list[float](), list[float]()
    for _ in range(pairs):
        here.append(seconds(lambda: next(mine)))
        there.append(seconds(lambda: next(peer)))
    print(f"{trainer.size:,} parameters, batch {batch_size}, {torch.get_num_threads()} threads")
    print(f"images/s here:  {middle([batch_size / passed for passed in here])}")
    print(f"images/s there: {middle([batch_size / passed for passed in there])}")
    print(f"ratio: {middle([b / a for a, b in zip(here, there, strict=True)])}")
    for phase, total in trainer.phases.seconds.items():
        print(f"{phase}: {(total - before[phase]) / sum(here):.2%} of our time")
    mine.close()  # type: ignore[attr-defined]


def start(data: Path, folder: Path, repeats: int) -> None:
    """From the recipe to the end of the first step, with imports done."""
    times = []
    for turn in range(repeats):
        began = time.perf_counter()
        steps = ours(data, folder / str(turn), "training.steps=10").steps()
        next(progress for progress in steps if progress.notice is None)
        times.append(time.perf_counter() - began)
        steps.close()  # type: ignore[attr-defined]
    print(f"start to first step: {middle(times, ' s')}")


def memory(folder: Path, steps: int) -> None:
    """The peak of this process's memory after each fifth of many small steps."""
    small = ("network.channels=8", "network.head_channels=8", "training.batch_size=16", f"training.steps={steps}")

    def step_done(progress: Progress) -> bool:
        return progress.notice is None and progress.step % (steps // 5) == 0

    trainer = Trainer(load("digits", [*QUIET, *small]), folder)
    peaks = [
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 for progress in trainer.steps() if step_done(progress)
    ]
    print(f"peak memory after each fifth of {steps} steps: {', '.join(f'{peak:,.1f}' for peak in peaks)} MB")


def stall(folder: Path, repeats: int) -> None:
    """How long a checkpoint of about 100 million parameters keeps training from its next step, and how much longer
    the steps beside its writing take."""
    large = ("network.channels=352", "network.head_channels=88", "training.batch_size=8", "training.steps=1000000")
    trainer = Trainer(load("digits", [*QUIET, *large]), folder)
    steps = trainer.steps()
    for _ in range(3):  # in the first, memory is handed out for the copies
        next(steps)
    trainer.writer.wait()
    still, alone, beside = list[float](), list[float](), list[float]()
    for _ in range(repeats):
        alone.append(seconds(lambda: next(steps)))
        still.append(seconds(trainer.save_checkpoint))
        beside.append(seconds(lambda: next(steps)))
        trainer.writer.wait()
    print(f"{trainer.size:,} parameters: training stands still for {middle(still, ' s')}, the first {still[0]:.2f} s")
    print(f"a step alone: {middle(alone, ' s')}; beside the writing: {middle(beside, ' s')}")
    steps.close()  # type: ignore[attr-defined]


def main() -> None:
    """The chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--pairs", type=int, default=20, help="steps of each competitor")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="starts and checkpoints")
    parser.add_argument("--steps", type=int, default=5000, help="of the look at memory")
    given = parser.parse_args()
    keep_freed_memory()  # as every command does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in given.parts:
            speed(given.data, folder / "speed", given.pairs, given.batch_size)
        if "start" in given.parts:
            start(given.data, folder / "start", given.repeats)
        if "memory" in given.parts:
            memory(folder / "memory", given.steps)
        if "stall" in given.parts:
            stall(folder / "stall", given.repeats)


if __name__ == "__main__":
    main()
