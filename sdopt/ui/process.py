"""Whether a job's process lives: it holds a lock, which goes with it however it ends.

The lock is taken before the process is started and handed to it as an open file. Numbers of
processes are used again and say nothing later; the one in the file counts while the lock is held.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@contextmanager
def locked(file: Path) -> Iterator[int]:
    """Hold the lock, to hand it to a process; gives the open file's number."""
    handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        yield handle
    finally:
        os.close(handle)


@contextmanager
def watched(file: Path) -> Iterator[Process]:
    """The process that holds the lock, to be looked at even after the file was removed."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        yield Process(None)
        return
    try:
        yield Process(handle)
    finally:
        os.close(handle)


def sign(lock: int) -> None:
    """Write this process's number into the lock file that it was handed."""
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    os.set_inheritable(lock, False)


@dataclass(frozen=True)
class Process:
    """The process of a job, known by the lock that it holds: numbers are used again, locks not.

    ``lock`` is the open lock file, None where the job was never started.
    """

    lock: int | None

    def alive(self) -> bool:
        """Whether it lives."""
        if self.lock is None:
            return False
        try:
            # Shared, so that two who look do not take each other for the job.
            fcntl.flock(self.lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        return False

    def send(self, number: int) -> bool:
        """Send a signal to it and all that it started; whether it had its number yet."""
        data = os.pread(self.lock, 32, 0) if self.lock is not None and self.alive() else b""
        if not (data.endswith(b"\n") and data.strip().isdigit()):
            return False
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(int(data), number)
        return True
