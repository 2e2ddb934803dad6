"""What every engine does alike: which task may start, what a finished one lets start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from sdopt.errors import WorkerError
from sdopt.sweep.provenance import now
from sdopt.sweep.records import Failure, Outcome, Task

OnDone = Callable[[Task, Outcome], None]
"""Told of each task when it is finished, once, in the driver; what needs it starts afterwards."""

ATTEMPTS = 3
"""How often a task whose worker is lost is begun before that counts as its outcome."""


class Engine(AbstractContextManager["Engine"], Protocol):
    """Something that runs tasks; opened once for all rounds of a sweep."""

    @property
    def label(self) -> str:
        """For people: ``2 processes``."""

    def run(self, tasks: Sequence[Task], known: Mapping[str, Outcome], on_done: OnDone) -> None:
        """Run all tasks, each after those that it needs; returns when all are finished.

        Args:
            tasks: no two with one key, none that is in ``known``.
            known: outcomes of earlier tasks, by key: needs may be among them, and their files are
                in the driver's place.
            on_done: is called for each task exactly once; the files of the outcome are in the
                driver's place by then. A task that needs a failed one gets that failure.
        """


class Schedule:
    """Which of some tasks may start now. It knows nothing of how they run.

    Args:
        tasks: all of them.
        known: outcomes of earlier tasks.
        quiet: whether all tasks run on one machine, where timing is to have its device without
            scoring beside it, and waits until nothing else can run there.
        alone: the name of what a task must have for itself among those at work, None where it
            needs nothing; by default timing has its device, and the work bundle has one writer.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        known: Mapping[str, Outcome],
        alone: Callable[[Task], str | None] | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self._left = {task.key: task for task in tasks}
        self._known = dict(known)
        self._alone = alone or locally_alone
        self._quiet = quiet
        self._running: dict[str, Task] = {}
        self._attempts: dict[str, int] = {}
        self._beside: dict[str, dict[str, None]] = {}

    @property
    def done(self) -> bool:
        """Whether nothing is left and nothing is at work."""
        return not self._left and not self._running

    def ready(self) -> list[Task]:
        """Tasks that may start now, in the order they were given; a started one is not among them.

        Of those that exclude one another the first is given only. Timing comes after all else.
        """
        held = {name for task in self._running.values() if (name := self._alone(task))}
        found = []
        busy = {task.device for task in self._running.values()}
        timed = {task.device for task in self._running.values() if task.kind == "time"}
        for task in sorted(self._left.values(), key=lambda one: one.kind == "time"):
            name = self._alone(task)
            if name in held or not all(need in self._known for need in task.needs):
                continue
            if self._quiet and task.device in (busy if task.kind == "time" else timed):
                continue
            busy.add(task.device)
            if name:
                held.add(name)
            found.append(task)
        return found

    def start(self, task: Task) -> None:
        """Say that a ready task is at work now."""
        del self._left[task.key]
        beside = self._beside.setdefault(task.key, {})
        for other in self._running.values():
            beside[other.label or other.key] = None
            self._beside[other.key][task.label or task.key] = None
        self._running[task.key] = task
        self._attempts[task.key] = self._attempts.get(task.key, 0) + 1

    def finish(self, task: Task, outcome: Outcome) -> list[tuple[Task, Outcome]]:
        """Say that a task is finished; gives it and those that cannot run any more, to tell of."""
        del self._running[task.key]
        whole = replace(
            outcome,
            attempts=self._attempts[task.key],
            beside=tuple(self._beside.pop(task.key, ())),
        )
        return self._settle(task, whole)

    def lost(self, task: Task, error: WorkerError) -> list[tuple[Task, Outcome]]:
        """Say that a task's worker is gone: it is ready again, or after some attempts failed."""
        if self._attempts[task.key] >= ATTEMPTS:
            return self.finish(task, Outcome(task.key, failure=Failure.of(error), finished=now()))
        del self._running[task.key]
        self._left[task.key] = task
        return []

    def again(self, keys: Sequence[str], tasks: Mapping[str, Task]) -> None:
        """Have finished tasks done again, whose files went with a lost machine."""
        for key in keys:
            self._known.pop(key, None)
            self._left[key] = tasks[key]

    def outcome(self, key: str) -> Outcome:
        """The outcome of a finished task."""
        return self._known[key]

    def unfit(self) -> list[tuple[Task, Outcome]]:
        """Tasks that cannot run because one that they need failed before; to tell of at first."""
        found: list[tuple[Task, Outcome]] = []
        for key in [key for key, one in self._known.items() if not one.ok]:
            found += self._fail_those_that_need(key)
        return found

    def _settle(self, task: Task, outcome: Outcome) -> list[tuple[Task, Outcome]]:
        self._known[task.key] = outcome
        found = [(task, outcome)]
        if not outcome.ok:
            found += self._fail_those_that_need(task.key)
        return found

    def _fail_those_that_need(self, key: str) -> list[tuple[Task, Outcome]]:
        found: list[tuple[Task, Outcome]] = []
        failed = self._known[key]
        for task in [one for one in self._left.values() if key in one.needs]:
            if task.key not in self._left:
                continue
            del self._left[task.key]
            same = replace(failed, key=task.key, seconds=0.0, beside=(), attempts=0)
            found += self._settle(task, same)
        return found


def locally_alone(task: Task) -> str | None:
    """On one machine: a device is timed by one, and the work bundle is written by one."""
    return task.device if task.kind == "time" else None if task.kind == "score" else "bundle"
