"""Where something is measured: the machine, and what is installed on it."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def machine() -> str:
    """Processor, cores that may be used, memory and system; never the machine's name."""
    return (
        f"{processor()}, {usable_cores()} cores, {memory_bytes() / 1e9:.0f} GB, "
        f"{platform.system()}"
    )


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, in bytes; it never falls."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kB


def processor(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's name as Linux tells it, else its architecture."""
    text = cpuinfo.read_text("utf-8", "replace") if cpuinfo.is_file() else ""
    names = (line.partition(":")[2] for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine()).strip()


def version_of(module: str, package: str) -> tuple[str, str]:
    """The distribution that brings a module, and its version.

    It may be another than the one that we would install: onnxruntime-gpu brings onnxruntime.
    """
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(module, [package])
        return names[0], metadata.version(names[0])
