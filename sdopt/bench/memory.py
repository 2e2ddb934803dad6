"""What one row takes: measured in a process of its own, which holds nothing else."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sdopt
from sdopt.bench import device, feeds, images
from sdopt.bench.rows import Contestant, contestants
from sdopt.bench.settings import Settings
from sdopt.bench.tables import Memory
from sdopt.bundle import Bundle

STEPS = 2
"""Denoising steps of the image that is drawn: more of them take no more memory."""

STATUS = Path("/proc/self/status")

# Not multiprocessing: its spawn runs the caller's own main module again.
_CHILD = "import sys; from sdopt.bench.memory import child; child(*sys.argv[1:])"


def measure(bundle: Bundle, row: Contestant, settings: Settings, *, whole: bool) -> Memory:
    """The memory of a row: it draws one batch of images (``whole``), or runs each component once.

    A process that dies is told of in ``why``, with what it said last.
    """
    size = settings.size(bundle) if whole else ""
    doing = (
        f"{settings.batch} image(s) of {size} pixels, {min(STEPS, settings.steps)} steps"
        if whole
        else f"{', '.join(row.stages)}: all open, each computed once"
    )
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.json", Path(folder) / "found.json"
        given.write_text(
            json.dumps(
                {
                    "bundle": str(bundle.path),
                    "components": list(row.stages),
                    "stage": row.stage,
                    "target": row.text,
                    "whole": whole,
                    "settings": settings.to_json(),
                }
            )
        )
        ran = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, str(given), str(found)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": _path()},
            check=False,
        )
        if ran.returncode or not found.is_file():
            return Memory(doing, why=_why(ran), device="not measured: the process ended early")
        return Memory(doing, **json.loads(found.read_text()))


def child(given: str, found: str) -> None:
    """The other process: reads what to do from one file, writes what it took to another."""
    asked = json.loads(Path(given).read_text())
    bundle, settings = Bundle.open(asked["bundle"]), Settings.from_json(asked["settings"])
    (row,) = contestants(bundle, [asked["stage"]], [asked["target"]], asked["components"])
    with device.nvml() as (nvml, why):
        _import(bundle, row, whole=asked["whole"])
        card = row.target.cuda_device()
        meter = device.Meter(nvml, card) if nvml is not None and card is not None else None
        base = _resident("VmRSS")
        compute = _draw if asked["whole"] else _compute
        loaded = compute(bundle, row, settings)
        taken: dict[str, Any] = {
            "base_bytes": base,
            "loaded_bytes": loaded,
            "peak_bytes": _resident("VmHWM"),
            "why": "" if base is not None else f"there is no {STATUS} on this system",
            "device": why if card is not None else f"{row.text} computes on no NVIDIA card",
        }
        if meter is not None:
            taken |= {
                "device_bytes": meter.stop(),
                "device": f"NVML, {meter.name}, every {device.EVERY_SECONDS * 1000:.0f} ms",
            }
    Path(found).write_text(json.dumps(taken))


def _import(bundle: Bundle, row: Contestant, *, whole: bool) -> None:
    """Everything that is imported when it is first used, so that it is in the base."""
    for module in row.target.packages:
        importlib.import_module(module)
    if whole:
        images.load_libraries(bundle)


def _draw(bundle: Bundle, row: Contestant, settings: Settings) -> int | None:
    """Draw one batch; the resident size when the pipeline was loaded."""
    steps = min(STEPS, settings.steps)
    made = images.draw(bundle, row, settings, batches=1, steps=steps)
    loaded = _resident("VmRSS")
    for _ in made:
        pass
    return loaded


def _compute(bundle: Bundle, row: Contestant, settings: Settings) -> int | None:
    """Compute every component once; the resident size when all were open."""
    sessions = {name: row.open(name) for name in row.stages}
    loaded = _resident("VmRSS")
    for name, session in sessions.items():
        made = feeds.make(bundle, row.stages[name], session.inputs, settings, steps=False)
        session.run(made.for_ports(session.inputs, str(row.stages[name].path))[0])
    return loaded


def _resident(key: str) -> int | None:
    """A size in bytes that Linux tells of this process in kB; None on other systems.

    Not ``ru_maxrss``: that of a child is never below what its parent had when it forked.
    """
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _path() -> str:
    """Where the other process finds this very sdopt, before any other that is installed."""
    root = str(Path(sdopt.__file__).parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _why(ran: subprocess.CompletedProcess[bytes]) -> str:
    if ran.returncode < 0:
        return f"its process was ended by signal {-ran.returncode}: out of memory?"
    lines: Sequence[str] = ran.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"its process failed: {lines[-1] if lines else f'exit code {ran.returncode}'}"
