"""The command line. Nothing heavy is imported here, so that `carrara --help` answers at once."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from io import TextIOWrapper

from carrara.errors import UserError

# OpenMP's threads wait in a busy loop for each other. Where another program has one of the cores, a long loop takes
# from it what it waits for: two threads on two half-busy cores were slower than one (docs/results.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
_OF_THE_USER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP, errno.ENAMETOOLONG}
"""Of the file system's refusals those that are no fault of the program."""
_LARGEST = 32 * 2**20  # what glibc allows for the second


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step, which needs as much.

    glibc gives blocks of more than 128 KiB back to the system, and gets them again zeroed, page by page: a tenth of a
    training step on a CPU (docs/results.md). Both thresholds are needed; with one of them more goes back and forth.
    Elsewhere, and where the environment sets them, nothing is changed.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another C library; on Windows there is no such handle
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def main() -> None:
    """Run a command. A user's mistake is one sentence on stderr and exit code 2, without a traceback."""
    from carrara.cli.app import app

    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8, nor terminals show more than ASCII
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        print(f"carrara: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None or error.errno not in _OF_THE_USER:
            raise
        print(f"carrara: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
