"""The work of a sweep in pieces that run the same in any process on any machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from sdopt import datafile
from sdopt.errors import SdoptError
from sdopt.sweep import building, provenance, scoring, staging, timing
from sdopt.sweep.place import OUTCOMES, Place
from sdopt.sweep.records import Failure, Found, Kind, Outcome, Task

__all__ = ["Failure", "Found", "Kind", "Outcome", "Task", "execute"]

_DO: Mapping[Kind, Callable[[Task, Place], Found]] = {
    "stage": staging.do,
    "build": building.do,
    "score": scoring.do,
    "time": timing.do,
}


def execute(task: Task, place: Place) -> Outcome:
    """Do a task in a place; an error of the task's own is an outcome, and not raised.

    The outcome is on disk before this returns, and a task that has one there is not done again:
    so a measurement whose result was lost on its way to the driver is not made twice.
    """
    if (known := place.finished(task.key)) is not None:
        return known
    start = time.perf_counter()
    found, failure = Found(), None
    try:
        found = _DO[task.kind](task, place)
    except SdoptError as error:
        failure = Failure.of(error)
    path = place.outcome(task.key)
    outcome = Outcome(
        key=task.key,
        data=found.data,
        files=(*found.files, f"{OUTCOMES}/{path.name}") if failure is None else (),
        failure=failure,
        seconds=time.perf_counter() - start - found.waited,
        here=provenance.here(),
        finished=provenance.now(),
    )
    if failure is None:  # a failure is tried again where the driver did not hear of it
        path.parent.mkdir(parents=True, exist_ok=True)
        datafile.write_bytes(path, json.dumps(outcome.to_json()).encode())
    return outcome
