"""The U-Net beside diffusers' UNet2DModel: forward, training step, guided step, memory.

    python benchmarks/unet.py [--pairs 30] [--threads 2] [--clock wall|cpu] [--parts forward train guided memory]

The same architecture and number of weights (64 channels, ×1, ×2, ×2, two blocks a level, attention at 16 and 8,
32×32, batch 16), float32, eager. Contestants run in turn in one process with the same threads, and only the median
of the paired ratios is a claim. On a machine that others use too, `--threads 1 --clock cpu` counts the thread's own
time. `--compiled` adds the peer under torch.compile (which needs a C++ compiler and minutes).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from carrara.condition import Condition
from carrara.guidance import classifier_guidance
from carrara.guidance.classifier import log_gradient
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams
from carrara.process import NetworkDenoiser, NoisyClassifier, schedules

BATCH, SIZE = 16, 32
PARAMS = UNetParams(
    image_size=(SIZE, SIZE),
    channels=64,
    channel_mult=(1, 2, 2),
    blocks_per_level=2,
    attention=(2, 4),
    head_channels=64,
    adaptive_norm=False,
    resampling="convolution",
)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def peer() -> nn.Module:
    """diffusers' network of the same architecture."""
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )
    return model


def peers(compiled: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The contestants by name; ours first, the one that claims are made against second."""
    torch.manual_seed(0)
    ours, eager = UNet(PARAMS), peer()
    last = peer().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    counts = {sum(p.numel() for p in net.parameters()) for net in (ours, eager)}
    assert len(counts) == 1, f"the networks differ: {counts}"
    contestants: dict[str, Any] = {
        "carrara": ours,
        "diffusers, eager": eager,
        "diffusers, channels-last": last,
    }
    if compiled:
        contestants["diffusers, compiled"] = torch.compile(peer())
    return {name: Contestant(net, name.endswith("last")) for name, net in contestants.items()}


class Contestant:
    """A network as `(x, t) -> raw`."""

    def __init__(self, network: nn.Module, channels_last: bool) -> None:
        self.network = network
        self.channels_last = channels_last

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        raw = self.network(x, t)
        return raw if isinstance(raw, Tensor) else raw.sample


def interleaved(
    pairs: int, clock: Callable[[], float], contestants: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Seconds of each contestant, `pairs` times in turn, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(pairs + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    first = next(iter(times.values()))
    print(title)
    for name, values in times.items():
        ratios = sorted(b / a for a, b in zip(first, values, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        middle = statistics.median(ratios)
        spread = f"×{middle:.3f} (quartiles {low:.2f} to {high:.2f})"
        print(f"  {name:28} {1000 * statistics.median(values):8.1f} ms   {spread}")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator), torch.full((BATCH,), 500.0)


def forward(options: argparse.Namespace) -> None:
    x, t = batch()
    contestants = peers(options.compiled)
    channels = torch.randn(BATCH, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3)
    runs: dict[str, Callable[[], object]] = {name: partial(net, x, t) for name, net in contestants.items()}
    runs["one 128-channel convolution"] = lambda: F.conv2d(channels, weight, padding=1)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            contestants["diffusers, eager"](x, t)
        times = interleaved(options.pairs, CLOCKS[options.clock], runs)
    single = statistics.median(times.pop("one 128-channel convolution"))
    report(f"forward, {counter.get_total_flops() / 1e9:.1f} GFLOP as the peer counts them", times)
    peak = 2 * BATCH * 16 * 16 * 128 * 128 * 9 / single
    print(f"  peak of a 128-channel 3×3 convolution: {peak / 1e9:.0f} GFLOP/s")
    for name, values in times.items():
        rate = counter.get_total_flops() / statistics.median(values)
        print(f"  {name:28} {rate / 1e9:8.0f} GFLOP/s, {rate / peak:.0%} of the peak")


def train(options: argparse.Namespace) -> None:
    x, t = batch()

    def step(net: Any, fused: bool = False) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(net.network.parameters(), lr=1e-4, fused=fused)

        def run() -> None:
            F.mse_loss(net(x, t), x).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    # Ours takes its step as the trainer does, with the fused AdamW; the peers as diffusers' training example does.
    contestants = peers(options.compiled)
    runs: dict[str, Callable[[], object]] = {n: step(net, fused=n == "carrara") for n, net in contestants.items()}
    torch.manual_seed(0)
    runs["carrara, the peers' AdamW"] = step(Contestant(UNet(PARAMS), channels_last=False))
    report("training step", interleaved(options.pairs, CLOCKS[options.clock], runs))


def guided(options: argparse.Namespace) -> None:
    x, _ = batch()
    schedule = schedules.linear(1000)
    denoiser = NetworkDenoiser(UNet(PARAMS).eval(), schedule)
    params = EncoderClassifierParams(image_size=(SIZE, SIZE), channels=64, attention=(2, 4))
    classifier = NoisyClassifier(EncoderClassifier(params).eval(), schedule)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    together = classifier_guidance(classifier, 2.0, label=0)(denoiser)

    def apart() -> None:
        denoiser(x, 500.0, Condition())
        log_gradient(classifier, x, 500.0, labels)

    with torch.no_grad():
        times = interleaved(
            options.pairs,
            CLOCKS[options.clock],
            {
                "forward + classifier gradient": apart,
                "classifier-guided prediction": lambda: together(x, 500.0, Condition()),
            },
        )
    report("classifier guidance", times)


def memory(options: argparse.Namespace) -> None:
    """Peak memory above that of the loaded network (Linux), each in a process of its own."""
    print(f"training step, peak memory above the network's own, batch {BATCH}")
    for kind in ("stored", "checkpointed"):
        command = [sys.executable, __file__, "--memory-of", kind, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"  activations {kind:16} {float(done.stdout):8.0f} MiB")


def memory_of(kind: str) -> None:
    x, t = batch()
    network = UNet(replace(PARAMS, checkpointing=kind == "checkpointed"))
    network(x[:1], t[:1]).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_memory()
    network(x, t).square().mean().backward()
    print(peak_memory() - before)


def peak_memory() -> float:
    """The highest resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


PARTS = {"forward": forward, "train": train, "guided": guided, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--memory-of", choices=["stored", "checkpointed"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts one thread only: add --threads 1")
    torch.set_num_threads(options.threads)
    if options.memory_of:
        memory_of(options.memory_of)
        return
    print(f"torch {torch.__version__}, {options.threads} threads, {options.pairs} pairs, {options.clock} clock")
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
