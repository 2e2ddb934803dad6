"""Runs the tasks of a sweep in processes of this machine."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Self

import sdopt
from sdopt.errors import UsageError, WorkerError
from sdopt.sweep.engines.base import OnDone, Schedule
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task

_ENDED = 10.0
"""Seconds that a worker whose connection broke has to end by itself."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""One each, since the workers share the cores; onnxruntime has threads of its own."""


class Processes:
    """Some processes of this machine, each with one thread but where it times.

    Args:
        place: where they all work.
        workers: how many.

    Raises:
        UsageError: less than one.
    """

    def __init__(self, place: Place, workers: int) -> None:
        if workers < 1:
            raise UsageError(f"workers must be 1 or more, not {workers}")
        self.label = f"{workers} process" + "es" * (workers > 1)
        self._place, self._workers = place, workers
        self._idle: list[Worker] = []
        self._busy: dict[Worker, Task] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes, whatever they are doing."""
        for worker in (*self._idle, *self._busy):
            worker.stop()
        self._idle, self._busy = [], {}

    def run(self, tasks: Sequence[Task], known: Mapping[str, Outcome], on_done: OnDone) -> None:
        """See ``Engine``."""
        schedule = Schedule(tasks, known, quiet=True)
        for one, outcome in schedule.unfit():
            on_done(one, outcome)
        while not schedule.done:
            while len(self._busy) < self._workers and (ready := schedule.ready()):
                self._give(ready[0], schedule)
            for worker in Worker.those_with_news(list(self._busy)):
                task = self._busy.pop(worker)
                try:
                    outcome = worker.take()
                except WorkerError as error:
                    worker.stop()
                    finished = schedule.lost(task, error)
                else:
                    self._idle.append(worker)
                    finished = schedule.finish(task, outcome)
                for one, outcome in finished:
                    on_done(one, outcome)

    def _give(self, task: Task, schedule: Schedule) -> None:
        worker = self._idle.pop() if self._idle else Worker(self._place)
        self._busy[worker] = task
        schedule.start(task)
        worker.give(task)


class Worker:
    """A process that does tasks, one at a time; it ends by itself when this one does."""

    def __init__(self, place: Place) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # The modules that a scorer is imported from are found there too.
            path = [str(Path(sdopt.__file__).parent.parent), *filter(None, sys.path)]
            threads = dict.fromkeys(_THREADS, "1")
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "sdopt.sweep.engines.worker"),
                    *(str(theirs.fileno()), str(place.root)),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path))},
            )
        self._connection = Connection(ours.detach())

    @staticmethod
    def those_with_news(workers: Sequence[Worker]) -> list[Worker]:
        """Those that finished a task or ended; waits for one."""
        by_connection = {worker._connection: worker for worker in workers}
        return [by_connection[one] for one in wait(list(by_connection))]  # type: ignore[index]

    def give(self, task: Task) -> None:
        """Have a task done."""
        with suppress(BrokenPipeError, ConnectionResetError):  # take() tells how it ended
            self._connection.send_bytes(pickle.dumps(task))

    def take(self) -> Outcome:
        """What came of the task; waits for it.

        Raises:
            WorkerError: the process ended.
        """
        try:
            answer = pickle.loads(self._connection.recv_bytes())  # our own child wrote it
        except (EOFError, OSError) as error:
            raise self._ended() from error
        assert isinstance(answer, Outcome)
        return answer

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def _ended(self) -> WorkerError:
        try:
            code = self.process.wait(_ENDED)
        except subprocess.TimeoutExpired:
            code = 0
        ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return WorkerError(
            "its process ended before it was done",
            where=f"process {self.process.pid}",
            why=f"{ended}; what it printed stands above",
            hint="where memory ran out, use fewer --workers",
        )
