"""Side by side with peers: streaming moments, the Fréchet distance, and where an evaluation spends its time.

    python benchmarks/evaluation.py [--parts moments distance shares] [--dimension 2048] [--repeats 3]

Competitors run in turn (ours, theirs, ours, theirs, …) in one process with the same threads, and only the ratio
of their medians is a claim; single times depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from carrara.evaluation import Collected, Moments, collect, frechet_distance
from carrara.evaluation.features import Inception
from carrara.evaluation.features.inception_network import InceptionNetwork
from carrara.evaluation.measure import measure_frechet, measure_pairs
from carrara.evaluation.stamp import Stamp

PARTS = ["moments", "distance", "shares"]


def our_clock() -> Callable[[], float]:
    """Processor time on one thread, which a busy machine stretches least; else wall clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(repeats: int, *contestants: Callable[[], object]) -> list[list[float]]:
    """Seconds of each contestant by `our_clock`, `repeats` times in turn, after one warm-up round."""
    clock = our_clock()
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(repeats + 1):
        for number, run in enumerate(contestants):
            start = clock()
            run()
            if turn:
                times[number].append(clock() - start)
    return times


def row(name: str, ours: list[float], theirs: list[float]) -> None:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{name:42} {a:9.3f} s {b:9.3f} s   ×{b / a:5.1f}   ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)


def features(count: int, dimension: int, seed: int) -> Tensor:
    """float32 features with a spectrum over two decades in no particular basis, as those of networks have."""
    basis = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(dimension))).Q
    rows = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    spread: Tensor = rows * torch.logspace(0, -2, dimension) @ basis + 0.5
    return spread


def update_moments(dimension: int, repeats: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = dimension

        def forward(self, rows: Tensor) -> Tensor:
            return rows

    rows = features(4096, dimension, 0)
    for batch in (32, 50, 64, 128, 256):

        def ours(size: int = batch) -> None:
            moments = Moments(dimension)
            for part in rows.split(size):
                moments.update(part)
            moments.statistics()

        def theirs(size: int = batch) -> None:
            metric = FrechetInceptionDistance(feature=Identity())
            for part in rows.split(size):
                metric.update(part, real=True)

        row(f"moments of 4,096 rows, batches of {batch}", *interleaved(repeats, ours, theirs))


def distance(dimension: int, repeats: int) -> None:
    import scipy.linalg

    x, y = (Moments.of(features(2 * dimension + 500 * k, dimension, k)).statistics() for k in (0, 1))

    def ours() -> float:
        return frechet_distance(x, y)

    def theirs() -> float:
        root = scipy.linalg.sqrtm((x.covariance @ y.covariance).numpy())
        shift = (x.mean - y.mean).square().sum()
        return float(shift + x.covariance.trace() + y.covariance.trace()) - 2 * float(np.trace(root).real)

    print(f"distance {ours():.10g}, by scipy's sqrtm {theirs():.10g}")
    # Right after the peer the first distance pays for memory that the peer has given back; the next one does not.
    first, again, peer = interleaved(repeats, ours, ours, theirs)
    row(f"distance of moments, {dimension} dimensions", again, peer)
    row("the first one after the peer", first, peer)


def shares(images: int, count: int) -> None:
    """How much of an evaluation of `count` 32×32 samples is the network's, on this machine."""
    inception = Inception(random_network(), "random", official=False)
    pictures = torch.rand(images, 3, 32, 32) * 2 - 1
    inception(pictures[:8])
    forward = seconds(lambda: [inception(part) for part in pictures.split(32)]) / images * count
    rows = [features(count, 2048, seed) for seed in (0, 1)]
    collected, reference = (seen(own) for own in rows)
    stamp = Stamp(n=count, features="inception")
    streaming = seconds(lambda: seen(rows[0]))
    alone = seconds(lambda: frechet_distance(collected.statistics, reference.statistics))
    frechet = seconds(lambda: measure_frechet(collected, reference, stamp))
    pairs = seconds(lambda: measure_pairs(collected, reference, stamp))
    print(f"{count:,} samples of 32×32, the network extrapolated from {images}:")
    print(f"  network {forward:.0f} s, moments and hash {streaming:.1f} s, distance {alone:.1f} s:", end=" ")
    print(f"{forward / (forward + streaming + alone):.1%} in the network")
    print(
        f"  interval and extrapolation {frechet:.0f} s, kernel and manifold figures with intervals {pairs:.0f} s:",
        end=" ",
    )
    print(f"{forward / (forward + streaming + frechet + pairs):.1%} in the network with all figures")


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, by `our_clock`."""
    clock = our_clock()
    start = clock()
    work()
    return clock() - start


def random_network() -> InceptionNetwork:
    """Random weights cost the same as trained ones."""
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def seen(rows: Tensor) -> Collected:
    """What an evaluation knows of pictures with these features, without the network's work."""
    return collect((torch.zeros(100, 3, 32, 32) for _ in range(len(rows) // 100)), Replay(rows))


class Replay:
    """Features taken before, in their order: everything of an evaluation but the network."""

    name, checksum, preparation = "replay", "", ""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.position = rows, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.position += len(images)
        return self.rows[self.position - len(images) : self.position]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--samples", type=int, default=10_000, help="of the evaluation whose shares are shown")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.repeats} repeats")
    print(f"{'':42} {'carrara':>11} {'peer':>11}   ratio   (of pairs)")
    if "moments" in options.parts:
        update_moments(options.dimension, options.repeats)
    if "distance" in options.parts:
        distance(options.dimension, options.repeats)
    if "shares" in options.parts:
        shares(options.images, options.samples)


if __name__ == "__main__":
    main()
