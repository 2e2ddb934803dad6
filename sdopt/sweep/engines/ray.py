"""Runs the tasks of a sweep on a Ray cluster, which places them and says when a node is lost.

The driver's folder stays the only one that counts: what a node makes comes back to it before the
task is finished, so that a lost node takes nothing with it but what it was at.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from sdopt.errors import SdoptError, WorkerError
from sdopt.sweep.blobs import Blob, Digests, Writer, in_order
from sdopt.sweep.engines.base import OnDone, Schedule
from sdopt.sweep.engines.ray_cluster import Cluster, Node
from sdopt.sweep.engines.ray_driver import connect, ray_module
from sdopt.sweep.engines.ray_node import (
    Depot,
    Order,
    Sent,
    Started,
    Worked,
    perform,
    tidy,
)
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task
from sdopt.sweep.tasks import execute

INCOMING = "incoming"
"""The folder of the driver's place for files that are on their way."""

_UNDER_WAY = 4
"""Items that a node may send ahead of the driver."""
_PATIENCE = 1.0
"""Seconds after which the driver looks at the cluster anew."""
_TIDYING = 30.0


@dataclass
class _Span:
    """When a task was at work, by its machine's clock; ``end`` is None as long as it is."""

    label: str
    machine: str
    begin: float
    end: float = math.inf

    def meets(self, other: _Span) -> bool:
        """Whether both were at work on one machine at the same time."""
        apart = self.end < other.begin or other.end < self.begin
        return self is not other and self.machine == other.machine and not apart


@dataclass
class _Job:
    """A task that was given to the cluster."""

    task: Task
    stream: Any
    pinned: Node | None
    span: _Span | None = None
    writers: list[tuple[Blob, Writer]] = field(default_factory=list)

    def drop(self) -> None:
        for _, writer in self.writers:
            writer.drop()


class RayEngine:
    """A Ray cluster; this process is its driver and must run on one of its machines.

    A task for a card declares one GPU, and Ray gives it one; all others declare a CPU. A timing of
    the CPU declares all CPUs of its node, so that Ray runs nothing beside it.

    Args:
        place: the driver's.
        shared: files that every task works on, relative to the place's root.
        address: ``auto``, or ``HOST:PORT`` of the cluster's head.
        other_versions: take nodes whose packages are of other versions than the driver's.
        look: whether nodes may take the driver's files from a file system that they share.
        do: what does a task; for tests.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: there is no such cluster, or a node of it cannot be taken.
    """

    def __init__(
        self,
        place: Place,
        shared: Sequence[str],
        address: str = "auto",
        *,
        other_versions: bool = False,
        look: bool = True,
        do: Callable[[Task, Place], Outcome] = execute,
    ) -> None:
        self._ray = ray_module()
        self._place, self._digests = place, Digests(place.root)
        self._shared = [self._digests.blob(path) for path in in_order(shared)]
        named = [str(place.root.resolve()), *(f"{one.path} {one.digest}" for one in self._shared)]
        sweep = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]
        self._order = Order(sweep, place.root.resolve(), look, do)
        self._jobs: list[_Job] = []
        self._spans: list[_Span] = []
        self._looked = time.monotonic()
        shutil.rmtree(place.root / INCOMING, ignore_errors=True)  # of a driver that was killed
        self._own = connect(self._ray, address)
        try:
            self._cluster = Cluster(self._ray, other_versions)
            self._depot = self._cluster.depot(Depot, self._order.root)
        except BaseException:
            self._disconnect()
            raise
        self._perform = self._ray.remote(perform)

    @property
    def label(self) -> str:
        """For people: ``Ray, 2 nodes``."""
        count = len(self._cluster.nodes)
        return f"Ray, {count} node{'s' * (count != 1)}"

    def fetched(self) -> list[tuple[str, str]]:
        """Which node (Ray's id) fetched which blob (sha256) from the driver, in order."""
        found: list[tuple[str, str]] = self._ray.get(self._depot.fetched.remote())
        return found

    def __enter__(self) -> Self:
        """The engine is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the cluster go; what a broken-off sweep has on its nodes stays for the next run."""
        try:
            self._cancel()
            if kind is None:
                self._ray.wait(
                    ones := self._cluster.everywhere(tidy, self._order.sweep),
                    num_returns=len(ones),
                    timeout=_TIDYING,
                )
        finally:
            self._disconnect()

    def run(self, tasks: Sequence[Task], known: Mapping[str, Outcome], on_done: OnDone) -> None:
        """See ``sdopt.sweep.engines.base.Engine``.

        Raises:
            UsageError: a task wants a card and no node has one (any more), or a node that came
                later cannot be taken.
            StorageError: the driver or a node has no room.
        """
        self._cluster.check(tasks)
        schedule = Schedule(tasks, known, alone=lambda task: None)
        for task, outcome in schedule.unfit():
            on_done(task, outcome)
        try:
            while not schedule.done:
                ready = schedule.ready()
                for task in ready:
                    self._begin(schedule, task)
                if not self._jobs:  # there is no room: is there a node that ever has some?
                    time.sleep(_PATIENCE)
                    self._cluster.refresh()
                    self._cluster.check(ready)
                for task, outcome in self._news(schedule):
                    on_done(task, outcome)
        finally:
            self._cancel()

    def _begin(self, schedule: Schedule, task: Task) -> None:
        """Give a task to the cluster, if there is room for it."""
        taken = self._cluster.room(task, [(job.task, job.pinned) for job in self._jobs])
        if taken is None:
            return
        needed = [
            self._digests.blob(path)
            for need in task.needs
            for path in schedule.outcome(need).files
        ]
        stream = self._perform.options(
            **taken.options,
            name=task.label or task.kind,
            num_returns="streaming",
            max_retries=0,
            _generator_backpressure_num_objects=_UNDER_WAY,
        ).remote(task, self._order, [*self._shared, *needed], self._depot)
        schedule.start(task)
        self._jobs.append(_Job(task, stream, taken.node))

    def _news(self, schedule: Schedule) -> Iterator[tuple[Task, Outcome]]:
        """Wait for the next that a node says; yields tasks that are finished by it."""
        streams = [job.stream for job in self._jobs]
        ready = self._ray.wait(streams, timeout=_PATIENCE)[0] if streams else []
        for job in [one for one in self._jobs if any(one.stream is it for it in ready)]:
            yield from self._hear(schedule, job)
        if time.monotonic() - self._looked > _PATIENCE:
            self._looked = time.monotonic()
            self._cluster.refresh()
            for job in list(self._jobs):
                if job.span is None and job.pinned not in (None, *self._cluster.nodes):
                    self._ray.cancel(job.stream, force=True)
                    yield from self._lose(schedule, job, "its node is gone")

    def _hear(self, schedule: Schedule, job: _Job) -> Iterator[tuple[Task, Outcome]]:
        errors = self._ray.exceptions
        try:
            item = self._ray.get(next(job.stream))
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.RayError):  # what it waited for was lost
                yield from self._lose(schedule, job, str(error.cause))
                return
            raise (error.cause if isinstance(error.cause, SdoptError) else error) from None
        except errors.RayError as error:
            yield from self._lose(schedule, job, str(error))
            return
        if isinstance(item, Started):
            machine = self._cluster.node(item.node).machine
            job.span = _Span(job.task.label or job.task.key, machine, item.at)
            self._spans.append(job.span)
        elif isinstance(item, Worked) and job.span is not None:
            job.span.end = item.at
        elif isinstance(item, Sent):
            path = self._place.root / INCOMING / job.task.key / str(len(job.writers))
            job.writers.append((item.blob, Writer(item.blob, path)))
        elif isinstance(item, bytes):
            job.writers[-1][1].add(item)
        else:
            yield from self._finish(schedule, job, item)

    def _finish(
        self, schedule: Schedule, job: _Job, outcome: Outcome
    ) -> Iterator[tuple[Task, Outcome]]:
        """Put what a task made into the driver's place, and the task is finished."""
        with self._place.writing():
            for blob, writer in job.writers:
                writer.commit(self._place.root / blob.path)
        beside = tuple(one.label for one in self._spans if job.span and job.span.meets(one))
        self._forget(job)
        for task, found in schedule.finish(job.task, outcome):
            yield task, replace(found, beside=beside) if task is job.task else found

    def _lose(self, schedule: Schedule, job: _Job, why: str) -> Iterator[tuple[Task, Outcome]]:
        self._forget(job)
        where = f"{job.task.label or job.task.key} on a node of the cluster"
        yield from schedule.lost(
            job.task,
            WorkerError(
                "a worker of the cluster ended in the middle of its work",
                where=where,
                why=why.strip().partition("\n")[0],
                hint="run it again: what is finished stays",
            ),
        )

    def _forget(self, job: _Job) -> None:
        self._jobs.remove(job)
        job.drop()
        if job.span is not None and job.span.end == math.inf:
            self._spans.remove(job.span)
        earliest = min((one.span.begin for one in self._jobs if one.span), default=math.inf)
        self._spans = [one for one in self._spans if one.end >= earliest]
        shutil.rmtree(self._place.root / INCOMING / job.task.key, ignore_errors=True)

    def _cancel(self) -> None:
        for job in list(self._jobs):
            self._ray.cancel(job.stream, force=True)
            self._forget(job)

    def _disconnect(self) -> None:
        if self._own:
            self._ray.shutdown()
