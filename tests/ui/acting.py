"""Jobs that do as they are told: what ``fetch`` becomes in the processes of these tests.

The URL says what happens, ``act:WHAT``; the rest of a job's process is the real one.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdopt.ui.jobs import Call, JobQueue, JobView

_ACTS = '''
import os, signal, sys, time, types

def fetch(url, folder, *, limit_bytes=0, sha256=None, allow_private=False, progress=None):
    what, _, rest = url.removeprefix("act:").partition(":")
    globals()[what](rest, progress)
    return folder / "fetched"

def note(text, progress):
    for edge in "begin", "end":
        with open("notes.txt", "a") as file:
            file.write(f"{edge} {text} {os.getpid()}\\n")
        time.sleep(0.1)

def sleep(text, progress):
    progress("asleep", 0.5)
    try:
        time.sleep(60)
    finally:
        open("tidied.txt", "w").close()

def stubborn(text, progress):
    """As native code: no handler of Python's runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    progress("stubborn", 0.5)
    time.sleep(60)

def child(text, progress):
    import subprocess
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE
    )
    child.stdout.readline()  # it does not listen from here on
    open("child.txt", "w").write(str(child.pid))
    progress("a child", 0.5)
    child.wait()

def speak(text, progress):
    print(text * 5000, "the end")

def bug(text, progress):
    raise ZeroDivisionError("no number")

def die(text, progress):
    """Kills itself so often as the text says, over all starts of the job."""
    with open("deaths.txt", "a") as file:
        file.write("x")
    if len(open("deaths.txt").read()) <= int(text):
        os.kill(os.getpid(), signal.SIGKILL)

module = types.ModuleType("sdopt.ui.fetching")
module.fetch = fetch
sys.modules["sdopt.ui.fetching"] = module
'''


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are started from now on act."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(_ACTS))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def act(what: str) -> Call:
    """A call that does what is said."""
    return Call("fetch", {"url": f"act:{what}", "folder": "files"})


def until(true: Callable[[], object], seconds: float = 150) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def over(queue: JobQueue, *names: str) -> list[JobView]:
    """The jobs of these ids once they are over."""
    until(lambda: all(queue.job(name).state.final for name in names))
    return [queue.job(name) for name in names]


@contextmanager
def working(root: Path) -> Iterator[JobQueue]:
    """A queue that works, and leaves nothing running."""
    queue = JobQueue(root)
    queue.start()
    try:
        yield queue
        for one in queue.jobs():
            queue.cancel(one.id)
        until(lambda: not queue.busy())
    finally:
        queue.close()
