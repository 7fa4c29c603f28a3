"""SIGKILL a training again and again, and compare each run that ends with an undisturbed one, bit for bit.

python -m tests.invariance.kills 1000 --log kills.jsonl [--seed 0]

Each attempt is a process forked from a server that has imported everything once. Of five strikes two fall right after
a drawn step, two at a drawn moment (start-up, resuming and pruning among them), one before a drawn file operation of
a checkpoint's write or of its tidying up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tests.processes import CONTEXT
from tests.runs import tiny_recipe, train

LAST = 30
CHOICES = (
    f"training.steps={LAST}",
    "training.batch_size=8",
    "training.micro_batch=3",
    "training.checkpoint_every=3",
    "training.log_every=4",
    f"training.sample_every={LAST}",
    "training.tracker=none",
    "network.dropout=0.2",
    "sampling.count=2",
)

_REACH = 6
"""So many steps an attempt lives at most, unless it ends: a run is struck several times."""
_OPERATIONS = 24
"""File operations of two checkpoints, about."""
_PATIENCE = 3600  # on a machine where everything else goes first

Kind = Literal["step", "moment", "operation"]


@dataclass(frozen=True)
class Strike:
    """When to kill: after `at` steps of the attempt, after `at` seconds, or before its `at`-th file operation."""

    kind: Kind
    at: float

    @staticmethod
    def drawn(draw: random.Random, longest: float) -> Strike:
        """One strike; moments lie below `longest` seconds."""
        kind = draw.choices(("step", "moment", "operation"), (2, 2, 1))[0]
        if kind == "step":
            return Strike("step", draw.randint(1, _REACH))
        if kind == "moment":
            return Strike("moment", draw.uniform(0, longest))
        return Strike("operation", draw.randint(1, _OPERATIONS))


def worker(folder: Path, strike: Strike | None, pipe: Connection | None) -> None:
    """Train; tell of every step, and stand still before the file operation that is to be struck."""
    import torch

    from carrara.training import Trainer, checkpoint

    torch.set_num_threads(1)
    if strike is None or pipe is None:
        train(tiny_recipe(*CHOICES), folder)
        return
    passed = 0

    def halting(operation: Callable[..., Any]) -> Callable[..., Any]:
        def halted(*arguments: Any, **options: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == strike.at:
                pipe.send("operation")
                time.sleep(_PATIENCE)
            return operation(*arguments, **options)

        return halted

    if strike.kind == "operation":
        operations = (
            (checkpoint, "save_file"),
            (torch, "save"),
            (checkpoint, "_sync"),
            (os, "rename"),
            (shutil, "rmtree"),
        )
        for place, name in operations:
            setattr(place, name, halting(getattr(place, name)))
    for progress in Trainer(tiny_recipe(*CHOICES), folder).steps():
        if progress.notice is None:
            pipe.send("step")


def attempt(folder: Path, strike: Strike | None = None) -> str:
    """Train in a process of its own and kill it at the strike.

    Returns:
        "finished" where the run ended before, "writing" with half a checkpoint on the disk, else "training".
    """
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=worker, args=(folder, strike, there if strike else None))
    process.start()
    there.close()
    if strike is None:
        process.join()
    elif strike.kind == "moment":
        process.join(strike.at)
    else:
        seen = 0
        try:
            while seen < (strike.at if strike.kind == "step" else 1):
                assert here.poll(_PATIENCE), "the training stands still"
                seen += here.recv() == strike.kind
        except EOFError:
            process.join()
    if not process.is_alive():
        assert process.exitcode == 0, "the training failed by itself"
        return "finished"
    process.kill()
    process.join()
    return "writing" if any((folder / "checkpoints").glob(".step-*.partial")) else "training"


def campaign(
    folder: Path, kills: int, seed: int = 0, note: Callable[[dict[str, Any]], None] = lambda entry: None
) -> Counter[str]:
    """Kill until `kills` are through; each run that ends is compared with the undisturbed one, and a new one begun.

    Args:
        note: told of each kill and of each run that ended.

    Returns:
        How many kills fell into training, how many into writing, and how many runs ended and were the same.

    Raises:
        AssertionError: a run ended in other bits.
    """
    draw, counts = random.Random(seed), Counter[str]()
    straight, broken = folder / "straight", folder / "broken"
    server = CONTEXT.Process(target=os.getpid)
    server.start()
    server.join()
    began = time.monotonic()
    attempt(straight)
    longest = (time.monotonic() - began) * _REACH / LAST
    struck = 0
    while counts["training"] + counts["writing"] < kills or struck:
        enough = counts["training"] + counts["writing"] >= kills
        strike = None if enough else Strike.drawn(draw, longest)
        outcome = attempt(broken, strike)
        counts[outcome] += 1
        if outcome == "finished":
            assert_same_run(straight, broken)
            note({"run": counts["finished"], "kills": struck, "same bits": True})
            shutil.rmtree(broken)
            struck = 0
        else:
            assert strike is not None
            struck += 1
            whole = max((path.name for path in (broken / "checkpoints").glob("step-*")), default="none")
            kill = counts["training"] + counts["writing"]
            note({"kill": kill, strike.kind: round(strike.at, 3), "while": outcome, "newest": whole})
    return counts


def assert_same_run(one: Path, two: Path) -> None:
    """The last checkpoint (weights, mean, optimiser, sums of the log), the model and the log: every bit.

    Raises:
        AssertionError: names what differs.
    """
    import torch

    from tests.training.test_loop import assert_same_bits

    assert_same_bits(one, two, LAST)
    last = f"checkpoints/step-{LAST:08d}"
    for name in (f"{last}/network.safetensors", f"{last}/ema.safetensors", "model/network.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    mine, theirs = (torch.load(folder / last / "state.pt", weights_only=True) for folder in (one, two))
    for key in mine.keys() - {"optimisers"}:  # tensors, compared above
        assert mine[key] == theirs[key], key


def main() -> None:
    """The campaign from the command line, with a log of every kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kills", type=int)
    parser.add_argument("--log", type=Path, default=Path("kills.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork would find the threads of its parent missing
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(given.log, "w", encoding="utf-8") as log:

        def note(entry: dict[str, Any]) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()

        counts = campaign(Path(folder), given.kills, given.seed, note)
        total = {"all runs ended in the same bits": counts["finished"], "kills": dict(counts)}
        note({**total, "minutes": round((time.monotonic() - began) / 60, 1)})
    print(total)


if __name__ == "__main__":
    main()
