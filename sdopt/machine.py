"""Where something was measured, in one line of text."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def machine() -> str:
    """Processor, cores that may be used, memory and system; never the machine's name."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return f"{_processor()}, {cores} cores, {memory / 1e9:.0f} GB, {platform.system()}"


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, in bytes; it never falls."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kB


def _processor() -> str:
    text = _CPUINFO.read_text("utf-8", "replace") if _CPUINFO.is_file() else ""
    names = (line.partition(":")[2] for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine()).strip()
