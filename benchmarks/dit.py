"""The diffusion transformer and the U-Net trained on CIFAR-10 alike: loss, work and time.

    python -m benchmarks.dit [--steps 500] [--data ../shared/data/cifar10] [--batch 16]

Both are class-conditional, small enough for one CPU core, and have about the same multiplications per image; recipe,
seed, batches and noise are the same. The held-out loss is over the same test images, times and noise for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from carrara.condition import Condition
from carrara.recipe import load
from carrara.training import Trainer

NETWORKS = {
    "U-Net": "{channels: 24, channel_mult: [1, 2, 2], blocks_per_level: 1, attention: [4]}",
    "DiT, patches of 4": "{kind: dit, patch_size: 4, width: 192, depth: 6, heads: 3}",
    "DiT, patches of 2": "{kind: dit, patch_size: 2, width: 96, depth: 6, heads: 3}",
}


def measure(name: str, arguments: argparse.Namespace) -> str:
    """Train one network; its row of the table."""
    recipe = load(
        "cifar10",
        [
            f"data.path={arguments.data}",
            f"network={NETWORKS[name]}",
            f"training.steps={arguments.steps}",
            f"training.batch_size={arguments.batch}",
            "training.warmup=50",
            f"training.validate_every={arguments.steps}",
            "training.validation_split=test",
            "training.validation_images=512",
            "training.tracker=none",
            "training.ema=0",
            "training.log_every=50",
            "training.sample_every=1000000",
            "training.checkpoint_every=1000000",
            "sampling.count=1",
            "sampling.steps=1",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, Path(folder) / "run")
        condition = Condition(label=torch.zeros(1, dtype=torch.int64))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            trainer.network(torch.zeros(1, 3, 32, 32), torch.ones(1), condition)
        began = time.process_time()
        losses = [progress.loss for progress in trainer.steps() if progress.notice is None]
        seconds = (time.process_time() - began) / len(losses)
        log = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    held_out = [entry["validation"]["loss"] for entry in log if "validation" in entry]
    weights = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
    first, last = statistics.fmean(losses[:20]), statistics.fmean(losses[-100:])
    held = f"{held_out[-1]:.4f}" if held_out else "-"
    work = counter.get_total_flops() / 2e6
    return f"| {name} | {weights:.2f} M | {work:.0f} M | {seconds:.2f} s | {first:.3f} | {last:.4f} | {held} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | weights | multiplications per image | step (CPU time) | loss, first 20 | last 100 | held-out |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        print(measure(name, arguments), flush=True)


if __name__ == "__main__":
    main()
