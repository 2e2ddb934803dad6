"""Where it was measured: processor, memory, system, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import sdopt
from sdopt.bench.device import cards
from sdopt.bench.report import Machine

PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "onnx",
)
"""What decides how fast a row or an image is; those that are not installed are left out."""

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def machine(packages: Iterable[str] = ()) -> Machine:
    """This machine, now; ``packages`` are those of the targets."""
    known = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    found = {name: known[name] for name in dict.fromkeys([*PACKAGES, *packages]) if name in known}
    return Machine(
        cpu=_cpu(Path("/proc/cpuinfo")),
        cores=os.cpu_count() or 1,
        usable_cores=_usable(),
        memory_bytes=_memory(),
        cards=cards(),
        os=platform.platform(),
        python=platform.python_version(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        versions={"sdopt": sdopt.__version__, **found},
    )


def _cpu(path: Path) -> str:
    """The processor's name: Linux tells it in a file, other systems to ``platform``."""
    if path.is_file():
        for line in path.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
