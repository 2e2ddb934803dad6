"""A queue of jobs with one worker; all of its state lies in the bundles' folders.

A job is a process of its own: ending it ends native code too, and it outlives the server. Whoever
serves next finds it by its lock, follows it, and takes the rest in the order they were asked for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sdopt.errors import UsageError, storage_error
from sdopt.spec import suggest
from sdopt.ui.dispatcher import Dispatcher
from sdopt.ui.jobfolder import JobFolder
from sdopt.ui.records import VERBS, Asked, Call, Event, JobError, JobView, State
from sdopt.ui.shelf import Shelf

__all__ = ["Call", "Event", "JobError", "JobQueue", "JobView", "State"]

LOCK = ".sdopt-ui.lock"
"""In the root: held by the one server that starts jobs."""
_TITLE = 200


class JobQueue:
    """The jobs of all bundles in one folder.

    Every method may be called from any thread. Jobs may be looked at and asked for without
    ``start``; they wait for it. The newest 50 finished jobs of a bundle are kept.

    Args:
        root: the folder that the bundles lie in.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._shelf = Shelf(self._root)
        self._changed = threading.Condition(threading.RLock())
        self._dispatcher: Dispatcher | None = None
        self._lock: int | None = None
        # From the clock, so that no page takes the count of one server for that of the next.
        self._changes = time.time_ns() // 1_000_000
        self._over: dict[Path, JobView] = {}

    def start(self) -> None:
        """Take up what a server before this one left, and begin to work.

        Raises:
            UsageError: another server works on this folder.
            StorageError: the folder cannot be written.
        """
        try:
            handle = os.open(self._root / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise storage_error(error, f"write into {self._root}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                "another sdopt ui works on this folder",
                where=str(self._root),
                hint="open that one, or give another folder",
            ) from None
        self._lock = handle
        self._shelf.tidy()
        self._dispatcher = Dispatcher(self._shelf, self._changed, self._moved)

    def close(self) -> None:
        """Start nothing any more; a running job goes on, and the next ``start`` finds it."""
        if self._dispatcher is not None:
            self._dispatcher.stop()
        if self._lock is not None:
            os.close(self._lock)
        self._dispatcher = self._lock = None

    def submit(self, bundle: str, title: str, calls: Sequence[Call]) -> str:
        """Ask for a job, which runs after those asked for before; returns its id.

        Args:
            bundle: the folder of the bundle that it is about, which may not be there yet.
            title: what it is, for people.
            calls: what it does; the first that fails ends it.

        Raises:
            UsageError: a name that cannot be, no calls, an unknown verb, an argument that is
                nothing JSON has.
            StorageError: the disk is full or the folder cannot be written.
        """
        if not calls:
            raise UsageError("a job of no calls does nothing", where=bundle[:_TITLE])
        for call in calls:
            if call.verb not in VERBS:
                hint = suggest(call.verb, VERBS) or f"there are {', '.join(VERBS)}"
                raise UsageError(f"there is no verb {call.verb[:40]!r}", hint=hint)
        asked = Asked(title[:_TITLE], tuple(calls), time.time())
        with self._changed:
            job = self._shelf.place(bundle)
            self._shelf.forget_old(bundle)
            try:
                job.create(asked)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    "these arguments cannot be kept",
                    why=str(error),
                    hint="give numbers, texts, lists and tables",
                ) from error
            self._moved()
        return job.id

    def cancel(self, id: str) -> None:
        """End a job; one that is over already stays as it is.

        A running one cleans up first: what was there before is whole, what it was about to write
        is not there.

        Raises:
            UnknownNameError: there is no such job.
        """
        job = self._shelf.find(id)
        with self._changed:
            if not self._view(job).state.final:
                job.ask_to_end()
                if not job.alive():
                    job.finish(State.CANCELLED)
                self._moved()

    def forget(self, id: str) -> None:
        """Remove a job that is over, with its log, results and images.

        Raises:
            UnknownNameError: there is no such job.
            UsageError: it is not over.
        """
        job = self._shelf.find(id)
        with self._changed:
            if not self._view(job).state.final:
                raise UsageError("this job is not over", where=id, hint="cancel it first")
            job.remove()
            self._over.pop(job.path, None)
            self._moved()

    def jobs(self) -> list[JobView]:
        """All jobs, the newest first, without events, logs and results."""
        found = {job.path: self._view(job) for job in reversed(self._shelf.jobs())}
        # What is over is not read again, unless nothing could be read.
        self._over = {path: one for path, one in found.items() if one.ended is not None}
        return list(found.values())

    def job(self, id: str) -> JobView:
        """One job with all that a page shows of it.

        Raises:
            UnknownNameError: there is no such job.
        """
        return self._checked(self._shelf.find(id).view())

    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return any(not one.state.final for one in self.jobs())

    def changes(self) -> int:
        """A count that grows whenever a job was asked for, moved on, ended or went."""
        return self._changes

    def _moved(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def _view(self, job: JobFolder) -> JobView:
        return self._over.get(job.path) or self._checked(job.view(brief=True))

    def _checked(self, view: JobView) -> JobView:
        """A job that could not be told that it failed has failed all the same."""
        error = self._dispatcher.broken.get(view.id) if self._dispatcher else None
        if error is None or view.state is not State.QUEUED:
            return view
        return dataclasses.replace(view, state=State.FAILED, error=error)
