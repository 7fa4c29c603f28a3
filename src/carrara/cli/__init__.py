"""The command line. Nothing heavy is imported here, so that `carrara --help` answers at once."""

from __future__ import annotations

import sys

from carrara.errors import UserError


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
