"""The command line. Nothing heavy is imported here, so that `carrara --help` answers at once."""

from __future__ import annotations

import os
import sys

from carrara.errors import UserError

# OpenMP's threads wait in a busy loop for each other. Where another program has one of the cores, a long loop takes
# from it what it waits for: two threads on two half-busy cores were slower than one (docs/results.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Run a command. A user's mistake is one sentence on stderr and exit code 2, without a traceback."""
    from carrara.cli.app import app

    try:
        app()
    except UserError as error:
        print(f"carrara: {error}", file=sys.stderr)
        sys.exit(2)
    except ArithmeticError as error:
        print(f"carrara: {error}", file=sys.stderr)
        sys.exit(1)
