"""Started as users start it: torchrun with two processes, killed, and the same command again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.runs import TINY

SETS = [word for assignment in (*TINY, "training.tracker=none") for word in ("--set", assignment)]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "carrara", "train", "digits", "--out", str(folder), *SETS, "--json", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=180)


def test_torchrun_trains_on_two_processes_and_one_goes_on(tmp_path: Path) -> None:
    result = torchrun(tmp_path / "run", "--set", "training.decay=constant")
    assert result.returncode == 0, result.stderr
    assert '"processes": 2' in result.stdout
    assert result.stdout.count('"step": 12') == 1, "only the first process speaks"
    more = ["--set", "training.decay=constant", "--json"]
    command = [sys.executable, "-m", "carrara", "train", "digits", "--out", str(tmp_path / "run"), *SETS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=180)
    assert alone.returncode == 0, alone.stderr
    assert "made with processes 2, this is 1" in alone.stdout
