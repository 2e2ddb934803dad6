"""Where and with what a task ran."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Mapping
from typing import Any

from sdopt.bench.machine import machine

DECIDING = ("sdopt", "onnxruntime", "onnxruntime-gpu", "torch", "diffusers", "numpy", "onnx")
"""Packages whose version may change a result: a node with others is refused by default."""


@functools.cache
def here() -> Mapping[str, Any]:
    """This machine and what is installed on it, as ``sdopt bench`` tells it; plain data."""
    found = dataclasses.asdict(machine(("onnx-ir", "transformers", "ray", "optuna")))
    return {**found, "cards": list(found["cards"])}


def versions() -> dict[str, str]:
    """The versions that must agree between machines, Python's among them."""
    known = here()
    found = {name: known["versions"][name] for name in DECIDING if name in known["versions"]}
    return {"python": str(known["python"]), **found}


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
