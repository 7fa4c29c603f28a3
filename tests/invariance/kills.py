"""SIGKILL a training at random moments, again and again, and compare the end with that of an undisturbed run.

python -m tests.invariance.kills 1000 [--log kills.jsonl] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes import CONTEXT
from tests.runs import tiny_recipe, train

CHOICES = (
    "training.steps=40",
    "training.checkpoint_every=3",
    "training.log_every=4",
    "training.sample_every=40",
    "training.tracker=none",
    "training.micro_batch=5",
    "network.dropout=0.2",
)


def worker(folder: Path, halt: Path | None) -> None:
    """Train; with `halt`, leave that file and stand still in the middle of the first checkpoint's write."""
    import torch

    from carrara.training import checkpoint

    torch.set_num_threads(1)
    if halt is not None:

        def stand_still(path: Path) -> None:
            halt.touch()
            time.sleep(600)

        checkpoint._sync = stand_still
    train(tiny_recipe(*CHOICES), folder)


def strike(folder: Path, delay: float, halt: Path | None = None) -> str:
    """Train in a process of its own and kill it after `delay` seconds, or, with `halt`, once that file is there.

    Returns:
        "finished" where it was too late, "writing" within a checkpoint's write, else "training".
    """
    process = CONTEXT.Process(target=worker, args=(folder, halt))
    process.start()
    if halt is None:
        process.join(delay)
    else:
        until = time.monotonic() + 60
        while not halt.exists() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
    if not process.is_alive():
        assert process.exitcode == 0, "the training failed by itself"
        return "finished"
    process.kill()
    process.join()
    return "writing" if any((folder / "checkpoints").glob(".step-*.partial")) else "training"


def campaign(
    folder: Path,
    kills: int,
    compare: Callable[[Path, Path], None],
    seed: int = 0,
    note: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> Counter[str]:
    """Kill until `kills` are through; each run that ends is compared with the undisturbed one, and a new one begun.

    Args:
        compare: raises where two finished run folders differ.
        note: told of each kill.

    Returns:
        How many kills fell into training, how many into writing, and how many runs ended and were the same.
    """
    draw, counts = random.Random(seed), Counter[str]()
    straight, broken = folder / "straight", folder / "broken"
    began = time.monotonic()
    worker(straight, None)
    most = 1.2 * (time.monotonic() - began)
    while counts["training"] + counts["writing"] < kills:
        delay = draw.uniform(0, most)
        outcome = strike(broken, delay)
        counts[outcome] += 1
        note({"kill": counts["training"] + counts["writing"], "delay": round(delay, 3), "outcome": outcome})
        if outcome == "finished":
            compare(straight, broken)
            shutil.rmtree(broken)
    worker(broken, None)
    compare(straight, broken)
    counts["finished"] += 1
    return counts


def main() -> None:
    """The campaign from the command line, with a log of every kill."""
    from tests.training.test_loop import assert_same_bits

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kills", type=int)
    parser.add_argument("--log", type=Path, default=Path("kills.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(given.log, "w", encoding="utf-8") as log:

        def note(entry: dict[str, Any]) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        last = 40
        counts = campaign(Path(folder), given.kills, lambda a, b: assert_same_bits(a, b, last), given.seed, note)
        log.write(json.dumps({"same bits": counts["finished"], **counts}) + "\n")
    print(dict(counts))


if __name__ == "__main__":
    main()
