"""All jobs below a root: which there are, their names, and what is thrown away."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from sdopt.bundle import JOBS
from sdopt.errors import UnknownNameError
from sdopt.ui.inside import bundle_folder
from sdopt.ui.jobfolder import ID, JobFolder

KEPT = 50
"""Finished jobs kept per bundle; older ones go when another is asked for."""

_TICKS = 1 << 24
"""Of a second, as six hexadecimal digits count them."""


class Shelf:
    """The jobs of every bundle in ``root``, found anew whenever they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._last = 0

    def jobs(self) -> list[JobFolder]:
        """All of them, the oldest first."""
        found = (job for folder in self._folders() for job in _in(folder))
        return sorted(found, key=lambda job: job.id)

    def find(self, id: str) -> JobFolder:
        """One of them.

        Raises:
            UnknownNameError: there is no such job.
        """
        if ID.fullmatch(id):
            for folder in self._folders():
                job = JobFolder(folder / id)
                if job.made() and not job.path.is_symlink():
                    return job
        raise UnknownNameError(f"there is no job {id[:40]!r}", hint="it may have been forgotten")

    def place(self, bundle: str) -> JobFolder:
        """Where the next job of a bundle is to lie; its name sorts after all there are.

        Raises:
            UsageError: the bundle cannot have that name.
        """
        folder = bundle_folder(self.root, bundle)
        last = max((job.id for job in self.jobs()), default=None)
        after = max(self._last, _ticks(last) if last else 0)
        # Not the time alone: a clock may be set back.
        self._last = max(time.time_ns() * _TICKS // 10**9, after + 1)
        return JobFolder(folder / JOBS / _name(self._last))

    def forget_old(self, bundle: str) -> None:
        """Of a bundle's finished jobs keep the newest ``KEPT``."""
        jobs = sorted(_in(self.root / bundle / JOBS), key=lambda job: job.id)
        over = [job for job in jobs if job.finished()]
        for job in over[:-KEPT]:
            job.remove()

    def tidy(self) -> None:
        """Remove what a kill left of jobs that were being asked for or forgotten."""
        for folder in self._folders():
            for path in folder.iterdir():
                torn = ID.fullmatch(path.name) and not JobFolder(path).made()
                forgotten = path.name[0] == "." and ID.fullmatch(path.name[1:])
                if torn or forgotten:
                    shutil.rmtree(path)

    def _folders(self) -> list[Path]:
        """The folders of jobs; links are not followed."""
        bundles = [Path(one.path) for one in os.scandir(self.root) if not one.is_symlink()]
        found = [bundle / JOBS for bundle in bundles if not bundle.name.startswith(".")]
        return [folder for folder in found if os.path.isdir(folder) and not folder.is_symlink()]


def _in(folder: Path) -> Iterator[JobFolder]:
    try:
        names = os.listdir(folder)
    except OSError:  # it was removed just now, or nobody may look into it: no jobs to be seen
        return
    for name in names:
        job = JobFolder(folder / name)
        if ID.fullmatch(name) and not job.path.is_symlink() and job.made():
            yield job


def _name(ticks: int) -> str:
    seconds, rest = divmod(ticks, _TICKS)
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{when:%Y%m%d-%H%M%S}-{rest:06x}"


def _ticks(name: str) -> int:
    when, _, rest = name.rpartition("-")
    try:
        found = datetime.datetime.strptime(when, "%Y%m%d-%H%M%S").replace(tzinfo=datetime.UTC)
    except ValueError:  # digits that are no date, made by hand
        return 0
    return int(found.timestamp()) * _TICKS + int(rest, 16)
