"""Runs one command in a process of its own: wall seconds, peak memory, and how it ended."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a command took.

    Attributes:
        seconds: wall time from start to exit, imports included.
        cpu_seconds: processor time, user and system, of all its threads.
        peak_bytes: the largest resident size of the process, files it had mapped included.
        ok: whether it exited with 0 within the time limit.
        message: its last line on stdout, or why it failed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    ok: bool
    message: str


def measure(
    command: Sequence[str], timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> Measurement:
    """Run ``command`` to its end, or kill it and all that it started at the time limit.

    Call it from a small process: the peak that Linux tells for a child is never below what its
    parent had when it forked.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout_seconds, stop)
        timer.start()
        # wait4 tells this child's own peak; getrusage(RUSAGE_CHILDREN) mixes all of them.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        lines = [_last_line(stream) for stream in (out, err)]
    taken = (seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    if expired.is_set():
        return Measurement(*taken, False, f"no result after {timeout_seconds:.0f} s")
    if process.returncode:
        reason = lines[1] or lines[0] or f"exit {process.returncode}"
        if process.returncode < 0:
            reason = f"killed by {signal.Signals(-process.returncode).name}; {reason}"
        return Measurement(*taken, False, reason)
    return Measurement(*taken, True, lines[0])


def _last_line(stream: IO[bytes]) -> str:
    stream.seek(0)
    lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def machine() -> dict[str, str | int]:
    """The processor's name, the cores this process may use, and the memory in bytes."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    known = {"python": platform.python_version()}
    for package in packages:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    return known
