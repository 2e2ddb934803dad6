"""The command line: typer and rich live in this folder and nowhere else."""

from __future__ import annotations

import sys

from sdopt.errors import SdoptError


def main() -> None:
    """Run ``sdopt``; user errors end in a message and exit code 1 or 2, without a traceback."""
    from sdopt.cli.app import app

    try:
        app(prog_name="sdopt")
    except SdoptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
