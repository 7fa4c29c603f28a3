"""What addressed noise costs beside torch.randn: interleaved, as a ratio.

    python -m benchmarks.noise [--pairs 60]

Prints one line for each shape: the median ratio of the paired times, the quartiles of the ratios, both medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from carrara.process import Noise

SHAPES = ((64, 3, 32, 32), (64, 1, 8, 8), (64, 4, 64, 64), (1, 3, 256, 256), (8, 3, 32, 32))


def seconds(work: Callable[[], object]) -> float:
    """The time that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    pairs = parser.parse_args().pairs
    print(f"{torch.get_num_threads()} threads, {pairs} interleaved pairs, float32")
    for shape in SHAPES:
        noise = Noise(seed=1)
        ours, theirs = [], []
        for draw in range(pairs + 5):
            addressed = noise.at(draw)
            ours.append(seconds(lambda addressed=addressed, shape=shape: addressed.normal(shape)))  # type: ignore[misc]
            theirs.append(seconds(lambda shape=shape: torch.randn(shape)))  # type: ignore[misc]
        ours, theirs = ours[5:], theirs[5:]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{'×'.join(map(str, shape)):>12}: {middle:5.2f} times torch.randn (quartiles {low:.2f} to {high:.2f}), "
            f"{statistics.median(ours) * 1e3:.3f} ms against {statistics.median(theirs) * 1e3:.3f} ms"
        )


if __name__ == "__main__":
    main()
