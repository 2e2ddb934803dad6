"""A folder to work in, a tree beside it that nobody may touch, and a watch on memory and time."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sdopt.errors import PassError, SdoptError

MEMORY_BYTES = 64 << 20
"""What an entry point may allocate, beside a multiple of the bytes that it was given."""
MEMORY_FACTOR = 64
CPU_SECONDS = 10.0
"""Of this process for one example, so that a busy machine is no finding."""

SECRET = "secret.bin"
"""The file outside that hostile models point at."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.link": (0, 1),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,),
    "shutil.rmtree": (0,), "shutil.move": (0, 1),
}  # fmt: skip
"""Audit events that change files, and which of their arguments are the paths."""

_NEVER_READ = ("/etc/passwd", "/etc/shadow", "/dev/zero", "/proc/self/mem")


class EscapedError(AssertionError):
    """A file outside the sandbox was touched."""


class TooSlowError(BaseException):
    """An example took too long; no ``except Exception`` may catch it."""


class _Watch:
    """The one audit hook of this process (Python cannot take one away), on or off."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.outside = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int) or path is None:
                return
            writes = bool(flags & _WRITING) if flags else bool(set(str(mode)) & set("wax+"))
            self._judge(event, path, writes=writes)
        elif event in _CHANGES:
            for index in _CHANGES[event]:
                self._judge(event, args[index], writes=True)

    def _judge(self, event: str, path: Any, *, writes: bool) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        if real.startswith(self.outside) or real in _NEVER_READ:
            self.seen.append(f"{event} {real}")
        below = os.path.join(real, "").startswith(self.inside or "")
        if writes and not below and not _is_cache(real):
            self.seen.append(f"{event} {real}")


def _is_cache(path: str) -> bool:
    """What Python and its libraries write wherever they are imported, and nobody's data."""
    return "__pycache__" in path or path == os.devnull


_WATCH = _Watch()


class Sandbox:
    """``root/work`` is the entry point's, ``root/outside`` is everybody else's.

    ``fill`` writes what an example needs into ``work``, which is empty before each.
    """

    def __init__(self, root: Path, *, measured: bool = True) -> None:
        self.work = root / "work"
        self._outside = root / "outside"
        self._outside.mkdir(parents=True)
        (self._outside / SECRET).write_bytes(b"\x7f" * (1 << 16))
        (self._outside / "manifest.json").write_text("{}")
        (self._outside / "unet").mkdir()
        (self._outside / "unet" / "model.onnx").write_bytes(b"not yours")
        self._before = self._snapshot()
        self._measured = measured

    def fresh(self) -> Path:
        """The empty folder of the next example."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self.work

    def call(self, given: int, act: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What an entry point returns, None where it refuses, a failure where it does worse.

        Args:
            given: how many bytes the input has.
            act: the entry point.
            args: of ``act``.
            options: of ``act``.
        """
        result = None
        with self._watched(given):
            try:
                result = act(*args, **options)
            except SdoptError as error:
                self._speaks(error)
        return result

    @contextmanager
    def _watched(self, given: int) -> Iterator[None]:
        _WATCH.inside = os.path.join(os.path.realpath(self.work), "")
        _WATCH.outside = os.path.realpath(self._outside)
        _WATCH.seen = []
        started = self._measured and not tracemalloc.is_tracing()
        if started:
            tracemalloc.start()
        try:
            with _limited():
                yield
            peak = tracemalloc.get_traced_memory()[1] if started else 0
        finally:
            _WATCH.inside = None
            if started:
                tracemalloc.stop()
        if _WATCH.seen or self._snapshot() != self._before:
            raise EscapedError(f"files outside were touched: {_WATCH.seen or 'seen in the tree'}")
        allowed = MEMORY_BYTES + MEMORY_FACTOR * given
        assert peak <= allowed, f"{peak} bytes were allocated for {given} bytes of input"

    def _snapshot(self) -> list[tuple[str, int, int, bytes]]:
        found = []
        for path in sorted(self._outside.rglob("*")):
            state = path.stat()
            data = path.read_bytes() if path.is_file() else b""
            found.append((str(path), state.st_size, state.st_mtime_ns, data))
        return found

    @staticmethod
    def _speaks(error: SdoptError) -> None:
        """An error says what, and where or why or what to do."""
        assert error.message.strip(), repr(error)
        assert error.where or error.why or error.hint, f"nothing but: {error.message}"
        cause = error.__cause__
        if isinstance(error, PassError):  # which the runner makes of whatever a pass raises
            assert not isinstance(cause, MemoryError | RecursionError), f"{error}\nof {cause!r}"


@contextmanager
def _limited() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"still at work after {CPU_SECONDS} seconds of CPU time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def sandbox(*, measured: bool = True) -> Iterator[Sandbox]:
    """A sandbox in memory where there is such a file system: every example syncs files."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sdopt-fuzz-", dir=home) as folder:
        yield Sandbox(Path(folder), measured=measured)
