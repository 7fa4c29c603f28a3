"""First stages beside diffusers' AutoencoderKL of equal shape: encoding, decoding, and both, as images per second.

    python -m benchmarks.codecs [--pairs 10] [--batch 4] [--size 128] [--channels 128] [--threads 2] [--clock wall|cpu]

The shape is Stable Diffusion's (×1, ×2, ×4, ×4, two blocks a level), float32, eager; both hold the same number of
weights. Contestants run in turn in one process with the same threads, and only the median of the paired ratios is a
claim. On a machine that others use too, `--threads 1 --clock cpu` counts the thread's own time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from carrara.codecs import KLAutoencoder
from carrara.networks.autoencoder import AutoencoderParams

MULT = (1, 2, 4, 4)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def contestants(channels: int, x: Tensor) -> dict[str, list[Callable[[], object]]]:
    """What is timed, ours and theirs."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    ours = KLAutoencoder(AutoencoderParams(channels=channels, channel_mult=MULT)).eval()
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(channels * mult for mult in MULT),
        layers_per_block=2,
    ).eval()
    counts = {sum(p.numel() for p in net.parameters()) for net in (ours, theirs)}
    assert len(counts) == 1, f"the networks differ: {counts}"
    z, raw = ours.encode(x).mode(), theirs.encode(x).latent_dist.mode()
    return {
        "encode": [lambda: ours.encode(x).mode(), lambda: theirs.encode(x).latent_dist.mode()],
        "decode": [lambda: ours.decode(z), lambda: theirs.decode(raw).sample],
        "encode + decode": [
            lambda: ours.decode(ours.encode(x).mode()),
            lambda: theirs.decode(theirs.encode(x).latent_dist.mode()).sample,
        ],
    }


@torch.no_grad()
def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 10), ("batch", 4), ("size", 128), ("channels", 128), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    x = torch.rand(options.batch, 3, options.size, options.size) * 2 - 1
    print(
        f"{options.batch} images of {options.size}×{options.size}, {options.channels} channels, {options.pairs} pairs"
    )
    for name, pair in contestants(options.channels, x).items():
        times: list[list[float]] = [[], []]
        for turn in range(options.pairs + 1):
            for number, run in enumerate(pair):
                start = clock()
                run()
                if turn:  # the first round warms up
                    times[number].append(clock() - start)
        ratios = sorted(theirs / ours for ours, theirs in zip(*times, strict=True))
        ours, theirs = (options.batch / statistics.median(each) for each in times)
        print(
            f"{name:16} {ours:8.2f} images/s, diffusers {theirs:8.2f}: ×{statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
