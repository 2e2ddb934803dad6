"""The task ``time``: ``sdopt bench`` of one build, with its device to itself."""

from __future__ import annotations

import dataclasses
import time

from sdopt import registry
from sdopt.bench import bench
from sdopt.errors import BundleError
from sdopt.sweep.place import Place, device_lock
from sdopt.sweep.records import Found, Task


def do(task: Task, place: Place) -> Found:
    """Measure whole images, the denoiser, and memory in a process of its own.

    ``work``: ``build`` the key of the build's task; ``target``, ``shape``, ``batch``, ``denoiser``
    (the component), ``drawing`` (steps, guidance, scheduler), ``bench`` (rounds and so on, as
    ``sdopt.bench.bench`` takes them). Found: ``ms`` and ``rounds`` per image, ``denoiser_ms``,
    ``memory_bytes``, ``began`` and ``ended`` in seconds of the epoch, ``bench``: the whole report.

    Raises:
        SdoptError: see ``sdopt.bench.bench``.
    """
    work = task.work
    build = place.finished(work["build"])
    if build is None:
        raise BundleError("what is to be measured is not here", where=str(place.root))
    stage = str(build.data["stage"])
    target = dataclasses.replace(registry.make("targets", work["target"]), stage=stage)
    drawing = {name: work["drawing"][name] for name in ("steps", "guidance", "scheduler")}
    with device_lock(task.device) as waited:
        began = time.time()
        report = bench(
            place.bundle,
            stages=[stage],
            targets=[str(target)],
            components=[work["denoiser"]],
            shapes=work["shape"],
            batch=work["batch"],
            images=True,
            **drawing,
            **work["bench"],
        )
        ended = time.time()
    assert report.images is not None  # asked for
    (whole,), (row,) = report.images.rows, report.rows
    memory = row.memory
    held = None
    if memory is not None:
        on_card = target.cuda_device() is not None
        held = memory.device_bytes if on_card else memory.peak_bytes
    data = {
        "ms": whole.spread.p50 * 1000,
        "rounds": [one * 1000 for one in whole.rounds],
        "denoiser_ms": report.components[0].rows[0].spread.p50,
        "memory_bytes": held,
        "began": began,
        "ended": ended,
        "bench": report.to_json(),
    }
    return Found(data, (), waited)
