"""The one worker of a queue: starts the oldest job, follows it to its end, takes the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import sdopt
from sdopt.errors import SdoptError, storage_error
from sdopt.ui.jobfolder import JobFolder
from sdopt.ui.process import Process, locked, watched
from sdopt.ui.records import JobError, State
from sdopt.ui.shelf import Shelf

STARTS = 2
"""How often a job is started whose process ends without saying how."""
POLL = 0.2
"""Seconds between two looks at a running job; nothing is looked at while none runs."""
GRACE = 5.0
"""Seconds that a cancelled job has to clean up before it is killed."""


class Dispatcher:
    """Runs in a thread of its own until ``stop``.

    Args:
        shelf: the jobs.
        changed: is waited on while there is nothing to do, and held while a job is chosen.
        moved: is called when a job moved on; notifies ``changed``.
    """

    def __init__(
        self, shelf: Shelf, changed: threading.Condition, moved: Callable[[], None]
    ) -> None:
        self._shelf, self._changed, self._moved = shelf, changed, moved
        self._closing = False
        self._codes: dict[str, int] = {}
        self.broken: dict[str, JobError] = {}
        """Jobs that ended and whose folders could not be told so, by id."""
        self._thread = threading.Thread(target=self._run, name="sdopt jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Start nothing any more; a running job is left alone."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._moved()
            self._follow(job)
            self._moved()

    def _next(self) -> JobFolder | None:
        with self._changed:
            while not self._closing:
                job = self._choose()
                if job is not None:
                    return job
                self._changed.wait()
        return None

    def _choose(self) -> JobFolder | None:
        """The job that runs already, else the oldest that can be started."""
        jobs = [job for job in self._shelf.jobs() if not job.finished()]
        for job in jobs:
            if job.alive():
                return job
        for job in jobs:
            if job.id in self.broken or not job.readable():
                continue
            try:
                if self._start(job):
                    return job
            except SdoptError as error:
                self.broken[job.id] = JobError.of(error)
            except OSError as error:
                self.broken[job.id] = JobError.of(storage_error(error, "start the job"))
            self._moved()
        return None

    def _start(self, job: JobFolder) -> bool:
        """Start a job's process, unless the job is over: it was cancelled, or died too often."""
        starts = len(job.starts())
        if job.asked_to_end():
            job.finish(State.CANCELLED)
            return False
        if starts >= STARTS:
            job.finish(State.FAILED, self._died(job))
            return False
        if starts:
            job.tell(0, "interrupted, started again", 0.0)
        job.start()
        with locked(job.lock) as lock, open(job.log, "ab") as log:
            process = subprocess.Popen(
                # -P: a file that was put into the root must not pass for a module.
                [sys.executable, "-uP", "-m", "sdopt.ui.worker", str(job.path), str(lock)],
                cwd=self._shelf.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": _path()},
                pass_fds=[lock],
                start_new_session=True,
            )
        threading.Thread(target=self._reap, args=(job, process), daemon=True).start()
        return True

    def _reap(self, job: JobFolder, process: subprocess.Popen[bytes]) -> None:
        self._codes[job.id] = process.wait()
        with self._changed:
            self._changed.notify_all()

    def _follow(self, job: JobFolder) -> None:
        """Stay with a job until its process is gone, and end it if that is wanted."""
        seen, deadline = job.moves(), None
        with watched(job.lock) as process:
            while process.alive():
                if job.asked_to_end() or not job.path.is_dir():
                    deadline = _end(process, deadline)
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait(POLL)
                if seen != (seen := job.moves()):
                    self._moved()

    def _died(self, job: JobFolder) -> JobError:
        code = self._codes.get(job.id)
        how = "" if code is None else f" by signal {-code}" if code < 0 else f" with code {code}"
        return JobError(
            f"the job's process ended {STARTS} times without saying why",
            where=str(job.path.relative_to(self._shelf.root)),
            why=f"the last time{how}" if how else None,
            hint="see the end of the log; if memory ran out, use smaller sizes or one component",
        )


def _end(process: Process, deadline: float | None) -> float | None:
    """Ask a process to end, and kill it once the deadline is over; returns that."""
    if deadline is None:
        return time.monotonic() + GRACE if process.send(signal.SIGTERM) else None
    if time.monotonic() >= deadline:
        process.send(signal.SIGKILL)
    return deadline


def _path() -> str:
    """Where the job's process finds this very sdopt, before any other that is installed."""
    root = str(Path(sdopt.__file__).parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
