"""Memory that training frees stays with the program, which needs it again a step later."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from carrara.cli import keep_freed_memory

keep_freed_memory()
held = [np.ones(2**20) for _ in range(4)]  # 8 MiB each
del held
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * 2**23 // 4096
"""As many pages as the program fills after the first blocks."""


def faults(**environment: str) -> int:
    """How many pages the system hands out, zeroed, for blocks of a size that was freed before."""
    run = [sys.executable, "-c", PROGRAM]
    printed = subprocess.run(run, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(printed.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc decides")
def test_freed_blocks_are_used_again_unless_the_environment_says_otherwise() -> None:
    assert faults() < PAGES / 100
    # the threshold that glibc starts with, set by the user: every block goes back, in pages of 4 KiB or larger ones
    assert faults(MALLOC_MMAP_THRESHOLD_="131072") > 4 * faults()
