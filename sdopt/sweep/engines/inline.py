"""Runs the tasks of a sweep in this process, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from sdopt.sweep.engines.base import OnDone, Schedule
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task
from sdopt.sweep.tasks import execute


class Inline:
    """This process."""

    label = "this process"

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to close."""

    def run(self, tasks: Sequence[Task], known: Mapping[str, Outcome], on_done: OnDone) -> None:
        """See ``Engine``."""
        schedule = Schedule(tasks, known, quiet=True)
        for task, outcome in schedule.unfit():
            on_done(task, outcome)
        while not schedule.done:
            task = schedule.ready()[0]
            schedule.start(task)
            for one, outcome in schedule.finish(task, execute(task, self._place)):
                on_done(one, outcome)
