"""The command line: typer and rich live in this folder and nowhere else."""

from __future__ import annotations

import sys
from typing import NoReturn

from sdopt.errors import SdoptError, storage_error


def main() -> None:
    """Run ``sdopt``; user errors end in a message and exit code 1 or 2, without a traceback."""
    from sdopt.cli.app import app

    try:
        app(prog_name="sdopt")
    except SdoptError as error:
        _fail(error)
    except OSError as error:  # a folder that cannot be read or written, say
        _fail(storage_error(error, "read or write a file"))


def _fail(error: SdoptError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
