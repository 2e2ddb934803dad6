"""The process of one job: ``python -m sdopt.ui.worker JOB_DIR LOCK``, started by ``JobQueue``.

LOCK is the number of the open file that says that the job lives, locked already.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sdopt.errors import SdoptError, storage_error
from sdopt.ui.jobfolder import JobFolder
from sdopt.ui.process import sign
from sdopt.ui.records import JobError, State

INTERVAL = 0.1
"""Seconds between two events about the same thing."""


class Teller:
    """Progress of one of a job's calls, as events; not more of them than anyone can read.

    Args:
        job: where they go.
        step: the number of the call.
        count: of the calls.
        clock: seconds from any beginning.
    """

    def __init__(
        self, job: JobFolder, step: int, count: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job, self._step, self._count, self._clock = job, step, count, clock
        self._what = ""
        self._share = self._at = float("-inf")

    def __call__(self, what: str, share: float) -> None:
        """Write an event, unless it says what was said or the last one was just now."""
        now = self._clock()
        same = what == self._what
        if same and (share == self._share or now - self._at < INTERVAL):
            return
        self._what, self._share, self._at = what, share, now
        self._job.tell(self._step, what, (self._step + share) / self._count)


def main() -> None:
    """Carry out the job and write down how it ended; nothing is written if it is cancelled."""
    job, lock = JobFolder(Path(sys.argv[1])), int(sys.argv[2])
    sign(lock)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    os.chdir(job.path.parents[2])
    try:
        error = _work(job)
    except KeyboardInterrupt:
        # What verbs do on Ctrl-C is done: end whatever they started and could not end.
        os.killpg(os.getpgrp(), signal.SIGKILL)
        raise
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if error is None:
        job.finish(State.DONE)
    elif not job.asked_to_end():  # else it failed for being ended
        job.finish(State.FAILED, error)
    os._exit(0)  # a library that hangs when it is taken down must not hold up the queue


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM do what Ctrl-C does: verbs clean up, builders stop at their next step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.raise_signal(signal.SIGINT)


def _work(job: JobFolder) -> JobError | None:
    """Make the calls one after the other; returns what went wrong, which is in the log too."""
    try:
        _calls(job)
    except SdoptError as error:
        return _told(job, error)
    except OSError as error:
        return _told(job, storage_error(error, "read or write a file"))
    except Exception as error:
        _print(job, traceback.format_exc())
        return JobError(
            f"{type(error).__name__}: {error}", hint="this is a bug: the log has the traceback"
        )
    return None


def _calls(job: JobFolder) -> None:
    from sdopt.ui import verbs

    job.clear()
    calls = job.asked().calls
    for step, call in enumerate(calls):
        tell = Teller(job, step, len(calls))
        tell(call.verb, 0.0)

        def keep(result: verbs.Result, step: int = step) -> None:
            job.keep(step, result)

        keep(verbs.perform(verbs.Work(Path.cwd(), job, call, tell, keep)))
        tell(f"{call.verb}: done", 1.0)


def _told(job: JobFolder, error: SdoptError) -> JobError:
    _print(job, f"error: {error}\n")
    return JobError.of(error)


def _print(job: JobFolder, text: str) -> None:
    with open(job.log, "a", encoding="utf-8", errors="replace") as log:
        log.write(text)


if __name__ == "__main__":
    main()
