"""The report of the run that made a stage, kept beside it as ``<stage>.report.json``.

A stage does not need it: nothing but ``sdopt report`` reads it. It names the digest of the stage
that it tells of, so that one which a kill left beside a newer stage is known for what it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdopt import datafile, reading
from sdopt.errors import BundleError
from sdopt.machine import machine, peak_rss_bytes
from sdopt.manifest import read_object
from sdopt.report import ComponentReport

SCHEMA = 1
"""Raised whenever an older sdopt could misread what a newer one wrote."""

SUFFIX = ".report.json"

BUNDLE = "BUNDLE"
"""Stands for the bundle's folder in a kept command, since bundles are moved."""

_SCRATCH = f"{SUFFIX}.tmp"


@dataclass(frozen=True)
class StageReport:
    """How a stage was made.

    Attributes:
        verb: what made it: export, adopt, optimize or build.
        command: the words behind ``sdopt`` that made it, ``BUNDLE`` for the bundle.
        component: passes with counts, rewrites and skips; seconds, bytes written.
        written: when, in UTC (ISO 8601).
        machine: where, in words.
        peak_rss_bytes: of the process that made it, from its start until then: where it made
            several components, it is that of the largest so far.
        schema: of the file.
    """

    verb: str
    command: tuple[str, ...]
    component: ComponentReport
    written: str
    machine: str
    peak_rss_bytes: int
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """That of the stage it tells of."""
        return self.component.digest

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {**plain, "command": list(self.command), "component": self.component.to_json()}

    @classmethod
    def loads(cls, text: str, where: str) -> StageReport:
        """Read a report.

        Raises:
            BundleError: unreadable, or written by a newer sdopt.
        """
        data = read_object(text, where)
        try:
            plain = reading.fields(cls, data)
            if not plain["command"]:
                raise ValueError("it holds no command")  # noqa: TRY301
            component = ComponentReport.from_json(plain["component"])
            return cls(**{**plain, "component": component, "command": tuple(plain["command"])})
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                "this report of a stage cannot be read",
                where=where,
                why=f"{type(error).__name__}: {error}",
                hint="make the stage again with --force, or remove the file: nothing needs it",
            ) from error


@dataclass(frozen=True)
class Found:
    """The report of a stage as it is now, or ``why`` there is none."""

    report: StageReport | None
    why: str = ""
    stale: bool = False
    """Whether there is one, but of what the stage was before."""


def only(components: Sequence[str] | None) -> tuple[str, ...]:
    """The words of a command that name the components, where someone did."""
    return tuple(word for name in components or () for word in ("--component", name))


def path_of(stage: Path) -> Path:
    """Where the report of the stage whose ONNX file is ``stage`` lies."""
    return stage.with_name(f"{stage.stem}{SUFFIX}")


def keep(stage: Path, verb: str, command: tuple[str, ...], component: ComponentReport) -> None:
    """Write the report of a stage that was just committed; call it under the bundle's lock.

    Raises:
        StorageError: the disk is full or the folder is not writable; the stage is whole.
    """
    plain = dataclasses.replace(component, file=stage.name)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    put(stage, StageReport(verb, command, plain, now, machine(), peak_rss_bytes()))


def put(stage: Path, report: StageReport) -> None:
    """Write a report beside a stage, whole or not at all.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    text = json.dumps(report.to_json(), indent=1) + "\n"
    datafile.write_bytes(path_of(stage), text.encode())


def find(stage: Path, digest: str) -> Found:
    """The report beside the stage of that digest; what cannot be read is said, not raised."""
    path = path_of(stage)
    if not path.is_file():
        return Found(None, "no report of the run that made it is kept beside it")
    try:
        report = StageReport.loads(path.read_text("utf-8", "replace"), str(path))
    except BundleError as error:
        return Found(None, f"the report beside it cannot be used: {error.why or error.message}")
    if report.digest != digest:
        return Found(None, "the report beside it is of what the stage was before", stale=True)
    return Found(report)


def remove_orphans(stage: Path) -> None:
    """After a commit of ``stage``: drop reports of what it was before and of stages that are gone.

    A file of that ending which holds something else is not ours and stays.
    """
    folder = stage.parent
    for path in folder.glob(f"*{SUFFIX}"):
        name = path.name.removesuffix(SUFFIX)
        gone = not (folder / f"{name}.onnx").is_file()
        if name == stage.stem or (gone and _is_ours(path)):
            path.unlink(missing_ok=True)
    for path in folder.glob(f".*{_SCRATCH}*"):  # of a run that was killed while it wrote
        path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(BundleError):
        return bool(StageReport.loads(path.read_text("utf-8", "replace"), str(path)).digest)
    return False
