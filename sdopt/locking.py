"""One process at a time for a folder of results."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sdopt.errors import UsageError, storage_error


@contextlib.contextmanager
def alone_in(folder: Path, verb: str) -> Iterator[None]:
    """Make a folder and be the only process that ``verb`` (``evaluates``) into it meanwhile.

    Raises:
        UsageError: another process does.
        StorageError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise storage_error(error, f"make {folder}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another sdopt {verb} into this folder",
                where=str(folder),
                hint="wait for it to end, or use another folder (-o)",
            ) from error
        yield
    finally:
        os.close(handle)
