"""Where it was measured: processor, memory, system, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata

import sdopt
from sdopt.bench.device import cards
from sdopt.bench.report import Machine
from sdopt.machine import memory_bytes, processor, usable_cores

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
        cpu=processor(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=memory_bytes(),
        cards=cards(),
        os=platform.platform(),
        python=platform.python_version(),
        load=os.getloadavg()[0],
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        versions={"sdopt": sdopt.__version__, **found},
    )
