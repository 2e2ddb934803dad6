"""A job's folder, ``ROOT/BUNDLE/.jobs/ID``: all that is known of a job lies there.

    job.json        what was asked (``Asked``)
    lock            held while the job's process lives; holds its number
    starts.json     when it was started, once or twice
    events.jsonl    what it did, a line each, only ever appended to
    log.txt         what it printed
    result-N.json   what call N reported
    images/         what it drew
    cancel          somebody wants it to end
    error.json      why it failed
    done            how and when it ended; without it the job is not over

Files that are replaced appear whole or not at all; a torn last line of events is ignored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdopt import datafile, reading
from sdopt.errors import storage_error
from sdopt.ui import process
from sdopt.ui.records import Asked, End, Event, JobError, JobView, Line, State

ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
EVENTS = 100
"""How many of the last events a view holds."""
LOG_BYTES = 16 << 10
"""How much of the log's end a view holds."""

_EVENT_BYTES = 64 << 10
_BRIEF_BYTES = 4 << 10
_JOB, _STARTS, _EVENTS, _LOG = "job.json", "starts.json", "events.jsonl", "log.txt"
_CANCEL, _ERROR, _DONE = "cancel", "error.json", "done"
_UNREADABLE = (KeyError, TypeError, ValueError, OSError)
_MOVING = (_EVENTS, _LOG, _DONE)


class JobFolder:
    """One job on disk; any number of processes may look at it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._appending = threading.Lock()

    @property
    def id(self) -> str:
        """The job's name, which sorts by time."""
        return self.path.name

    @property
    def bundle(self) -> str:
        """The name of the bundle's folder."""
        return self.path.parent.parent.name

    @property
    def log(self) -> Path:
        """The file that the job's process prints to."""
        return self.path / _LOG

    @property
    def images(self) -> Path:
        """The folder of what it draws; made when it draws."""
        return self.path / "images"

    def create(self, asked: Asked) -> None:
        """Make the folder and write down what is asked; without that file it is no job.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        data = asked.dumps()
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise storage_error(error, f"make the folder {self.path}") from error
        datafile.write_bytes(self.path / _JOB, data)

    def made(self) -> bool:
        """Whether it is a job, and not one that is being asked for or forgotten just now."""
        return (self.path / _JOB).exists()

    def remove(self) -> None:
        """Remove the job; a kill in the middle leaves nothing that looks like one."""
        hidden = self.path.with_name(f".{self.id}")
        try:
            os.rename(self.path, hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            raise storage_error(error, f"remove {self.path}") from error

    def asked(self) -> Asked:
        """What was asked.

        Raises:
            KeyError, TypeError, ValueError: that cannot be read.
        """
        data = self._read(_JOB)
        if data is None:
            raise ValueError(f"there is no {_JOB}")
        return Asked.loads(data)

    def readable(self) -> bool:
        """Whether what was asked can be read; ``view`` says why not."""
        try:
            self.asked()
        except _UNREADABLE:
            return False
        return True

    @property
    def lock(self) -> Path:
        """The file whose lock the job's process holds; see ``sdopt.ui.process``."""
        return self.path / "lock"

    def alive(self) -> bool:
        """Whether the job's process lives, whoever started it."""
        with process.watched(self.lock) as found:
            return found.alive()

    def starts(self) -> list[float]:
        """When the job was started, in seconds since 1970."""
        data = self._read(_STARTS)
        try:
            return [float(one) for one in reading.table(data or b"{}").get("at", ())]
        except (TypeError, ValueError):  # edited by hand: as if it had not been started
            return []

    def start(self) -> None:
        """Note that the job is started now."""
        text = json.dumps({"at": [*self.starts(), time.time()]})
        datafile.write_bytes(self.path / _STARTS, text.encode())

    def tell(self, step: int, what: str, share: float) -> None:
        """Append an event.

        Raises:
            StorageError: the disk is full.
        """
        line = Line(time.time(), step, what, share).dumps()
        try:
            with self._appending, open(self.path / _EVENTS, "ab+") as file:
                end = file.seek(0, os.SEEK_END)
                # What a crash tore must not take the next line with it.
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line
                file.write(line)
        except OSError as error:
            raise storage_error(error, "write down what the job does") from error

    def keep(self, step: int, result: Mapping[str, Any]) -> None:
        """Write what a call reported, in place of what it did before."""
        datafile.write_bytes(self.path / f"result-{step}.json", json.dumps(result).encode())

    def clear(self) -> None:
        """Forget what an interrupted start left."""
        for path in self.path.glob("result-*.json"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.images, ignore_errors=True)

    def ask_to_end(self) -> None:
        """Note that somebody wants the job to end; waits for no disk that the job keeps busy."""
        (self.path / _CANCEL).touch()

    def asked_to_end(self) -> bool:
        """Whether somebody wants the job to end."""
        return (self.path / _CANCEL).exists()

    def finish(self, state: State, error: JobError | None = None) -> None:
        """Note how the job ended; nothing happens to it any more."""
        if error is not None:
            datafile.write_bytes(self.path / _ERROR, json.dumps(asdict(error)).encode())
        text = json.dumps({"state": state, "ended": time.time()})
        datafile.write_bytes(self.path / _DONE, text.encode())

    def finished(self) -> bool:
        """Whether the job is over."""
        return (self.path / _DONE).exists()

    def moves(self) -> tuple[int, ...]:
        """Changes whenever a running job has told, printed or finished something."""
        return tuple(_size(self.path / name) for name in _MOVING)

    def view(self, *, brief: bool = False) -> JobView:
        """The job as it is now; ``brief`` leaves events, log and results out."""
        try:
            return self._view(brief)
        except _UNREADABLE as error:
            what, hint = "this job cannot be read", "forget it, and ask for it again"
            why = JobError(what, str(self.path), str(error), hint)
            return JobView(self.id, self.bundle, self.id, State.FAILED, (), None, error=why)

    def _view(self, brief: bool) -> JobView:
        asked, starts = self.asked(), self.starts()
        runs = self.alive() or (starts and self.asked_to_end())  # until that is written down
        end = self._end()  # after that look, or one that ended in between would seem to wait
        lines = self._lines(_BRIEF_BYTES if brief else _EVENT_BYTES)
        state = end.state if end else State.RUNNING if runs else State.QUEUED
        last = lines[-1] if lines and state is not State.QUEUED else None
        first = starts[0] if starts else None
        events = () if brief or first is None else tuple(_event(line, first) for line in lines)
        return JobView(
            id=self.id,
            bundle=self.bundle,
            title=asked.title,
            state=state,
            calls=asked.calls,
            queued=asked.queued,
            started=first,
            ended=end.ended if end else None,
            step=last.step if last else 0,
            what=last.what if last else "",
            share=1.0 if state is State.DONE else last.share if last else 0.0,
            events=events[-EVENTS:],
            log="" if brief else self._tail(_LOG, LOG_BYTES).decode("utf-8", "replace"),
            results=() if brief else self._results(len(asked.calls)),
            error=self._error() if state is State.FAILED else None,
        )

    def _end(self) -> End | None:
        data = self._read(_DONE)
        return None if data is None else End.of(reading.table(data))

    def _lines(self, count: int) -> list[Line]:
        data = self._tail(_EVENTS, count)
        lines = data.split(b"\n")
        if len(data) == count:
            del lines[0]  # it may begin before what was read
        return [line for line in map(Line.loads, lines) if line is not None]

    def _results(self, count: int) -> tuple[dict[str, Any], ...]:
        found = (self._read(f"result-{step}.json") for step in range(count))
        return tuple(_result(data) for data in found if data is not None)

    def _error(self) -> JobError:
        data = self._read(_ERROR)
        try:
            return JobError(**reading.fields(JobError, reading.table(data or b"")))
        except (TypeError, ValueError) as error:
            return JobError("the reason cannot be read", str(self.path / _ERROR), str(error))

    def _read(self, name: str) -> bytes | None:
        path = self.path / name
        if path.is_symlink():  # nothing here writes links
            return None
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def _tail(self, name: str, count: int) -> bytes:
        path = self.path / name
        if path.is_symlink():
            return b""
        try:
            with open(path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - count))
                return file.read(count)
        except FileNotFoundError:
            return b""


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return -1


def _result(data: bytes) -> dict[str, Any]:
    try:
        return reading.table(data)
    except ValueError as error:
        return {"unreadable": str(error)}


def _event(line: Line, start: float) -> Event:
    return Event(line.at - start, line.step, line.what, line.share)
