"""Where the tasks of a sweep work: one folder per machine, with the same layout on each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdopt import reading
from sdopt.errors import storage_error
from sdopt.sweep.records import Outcome

BUNDLE, IMAGES, OUTCOMES = "bundle", "images", "outcomes"
RAW_FILES = "raw.json"


@dataclass(frozen=True)
class Place:
    """The folder in which a machine does its share of a sweep.

    ``bundle`` holds the stages and builds side by side, ``images/KEY/SEED`` what was drawn,
    ``outcomes/KEY.json`` each finished task. Paths in outcomes are relative to ``root``.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def bundle(self) -> Path:
        """The work bundle: the raw stage as it was given, and what the sweep made of it."""
        return self.root / BUNDLE

    def raw_files(self) -> list[str]:
        """The files of the work bundle as it was given, relative to ``root``."""
        return [str(one) for one in json.loads((self.root / RAW_FILES).read_text())]

    def images(self, key: str) -> Path:
        """The folder of the images of a scoring task."""
        return self.root / IMAGES / key

    def outcome(self, key: str) -> Path:
        """The file of a finished task."""
        return self.root / OUTCOMES / f"{key}.json"

    def finished(self, key: str) -> Outcome | None:
        """The outcome of a task that was finished here, if all its files are there."""
        path = self.outcome(key)
        if not path.is_file():
            return None
        outcome = Outcome.from_json(reading.table(path.read_bytes()))
        there = all((self.root / one).is_file() for one in outcome.files)
        return outcome if there else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[float]:
        """Hold the work bundle; whoever else wants to write into it waits.

        What is brought from another machine is put in under it too, data files before the graphs
        that use them: a commit removes data files that no graph names.
        """
        with waiting_lock(self.root / ".bundle.lock") as waited:
            yield waited


@contextlib.contextmanager
def device_lock(device: str) -> Iterator[float]:
    """Hold a device of this machine (``cpu``, ``cuda:0``) for timing; another timing waits.

    The lock is the machine's, whichever sweep, process or Ray node of it asks.
    """
    name = f"sdopt-{os.getuid()}-{_physical(device)}.lock"
    with waiting_lock(Path(tempfile.gettempdir()) / name) as waited:
        yield waited


def _physical(device: str) -> str:
    """A card by what CUDA_VISIBLE_DEVICES calls it, since ``cuda:0`` is what is visible."""
    kind, _, number = device.partition(":")
    shown = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if kind == "cuda" and int(number or 0) < len(shown) and shown[int(number or 0)]:
        number = shown[int(number or 0)]
    return f"{kind}-{number}" if number else kind


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[float]:
    """Hold a file's lock, after whoever holds it; gives the seconds that it waited.

    A process that is killed lets go.
    """
    start = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise storage_error(error, f"open {path.name}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield time.perf_counter() - start
    finally:
        os.close(handle)
