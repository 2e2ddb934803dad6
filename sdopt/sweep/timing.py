"""The task ``time``: what ``sdopt bench`` measures of whole images, with the device to itself."""

from __future__ import annotations

import dataclasses
import statistics
import time

from sdopt import registry
from sdopt.bench import images, memory
from sdopt.bench.rows import contestants
from sdopt.bench.settings import Settings
from sdopt.bench.tables import Measured, Memory
from sdopt.bench.timing import Turns
from sdopt.bundle import Bundle
from sdopt.errors import BundleError
from sdopt.sweep.place import Place, device_lock
from sdopt.sweep.records import Found, Task

WARM_UP = 1
"""Rounds that do not count, as ``bench`` has it for whole images."""


def do(task: Task, place: Place) -> Found:
    """Time whole images, and measure memory in a process of its own.

    ``work``: ``build`` the key of the build's task; ``target``, ``shape``, ``batch``, ``denoiser``
    (the component), ``drawing`` (steps, guidance, scheduler), ``bench``: ``rounds``, ``pause`` and
    whether ``memory`` is measured. Found: ``ms`` and ``rounds`` per image, ``denoiser_ms`` per
    call, ``memory_bytes``, ``began`` and ``ended`` in seconds of the epoch; ``images`` and
    ``memory`` hold all that was measured.

    Raises:
        SdoptError: see ``sdopt.bench.bench``.
    """
    work = task.work
    build = place.finished(work["build"])
    if build is None:
        raise BundleError("what is to be measured is not here", where=str(place.root))
    stage, bundle = str(build.data["stage"]), Bundle.open(place.bundle)
    target = dataclasses.replace(registry.make("targets", work["target"]), stage=stage)
    settings = Settings(
        shapes=work["shape"],
        batch=work["batch"],
        **{name: work["drawing"][name] for name in ("steps", "guidance", "scheduler")},
    )
    (row,) = contestants(bundle, [stage], [str(target)], images.drawing(bundle))
    turns = Turns(work["bench"]["rounds"], WARM_UP, work["bench"]["pause"])
    held: Memory | None = None
    with device_lock(task.device) as waited:
        began = time.time()
        if work["bench"]["memory"]:  # first, as long as this process holds no graph
            held = memory.measure(bundle, row, settings, whole=True)
        whole = images.measure(bundle, [row], settings, turns, lambda what, share: None)
        ended = time.time()
    (measured,) = whole.rows
    on_card = target.cuda_device() is not None
    data = {
        "ms": measured.spread.p50 * 1000,
        "rounds": [one * 1000 for one in measured.rounds],
        "denoiser_ms": _per_call(measured, work["denoiser"], work["batch"]),
        "memory_bytes": held and (held.device_bytes if on_card else held.peak_bytes),
        "began": began,
        "ended": ended,
        "images": whole.to_json(),
        "memory": held and dataclasses.asdict(held),
    }
    return Found(data, (), waited)


def _per_call(measured: Measured, component: str, batch: int) -> float | None:
    """Milliseconds of a call of a component, the median of the rounds; None if it ran in none."""
    calls = measured.calls.get(component, 0) / len(measured.rounds)
    if not calls:
        return None
    return statistics.median(one[component] for one in measured.inside) * batch * 1000 / calls
