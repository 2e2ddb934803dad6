"""The work of a sweep in pieces that run the same in any process on any machine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sdopt import datafile, reading
from sdopt.errors import SdoptError
from sdopt.sweep.place import Place

Kind = Literal["stage", "build", "score", "time"]


@dataclass(frozen=True)
class Task:
    """One piece of work: plain data, which JSON and pickle both carry.

    Attributes:
        kind: ``stage`` runs passes, ``build`` lowers and compiles for a target, ``score`` draws
            images and scores them, ``time`` measures.
        key: a digest of everything that decides what comes of it.
        needs: keys of the tasks whose files it works on.
        device: what it computes on: ``cpu``, or ``cuda:N`` as the process sees its cards.
        work: what to do, by kind; see ``sdopt.sweep.work``.
        label: for people.
    """

    kind: Kind
    key: str
    needs: tuple[str, ...] = ()
    device: str = "cpu"
    work: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "needs": list(self.needs), "work": dict(self.work)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """What ``to_json`` gave."""
        return cls(**{**data, "needs": tuple(data["needs"])})


@dataclass(frozen=True)
class Failure:
    """An error as data.

    Attributes:
        kind: the error's class, ``BuildError``.
        message: what is wrong.
        where: if it is known.
        why: likewise.
        hint: what to do.
    """

    kind: str
    message: str
    where: str | None = None
    why: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: SdoptError) -> Failure:
        """The error's words."""
        return cls(type(error).__name__, error.message, error.where, error.why, error.hint)

    def __str__(self) -> str:
        parts = (self.message, self.where, self.why)
        return ": ".join(" ".join(part.split()) for part in parts if part)


@dataclass(frozen=True)
class Outcome:
    """What came of a task, a failure too.

    Attributes:
        key: of the task.
        data: what was found, by kind; see ``sdopt.sweep.work``.
        files: what it made, paths relative to the place's root, data files before graphs.
        failure: why there is nothing found, if so.
        seconds: it took, waiting for locks left out.
        here: where: machine, card, versions (``sdopt.sweep.provenance.here``).
        beside: labels of the tasks that the engine had at work at the same time.
        attempts: how often it was begun; more than once where a worker was lost.
        finished: ISO 8601 in UTC.
    """

    key: str
    data: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    failure: Failure | None = None
    seconds: float = 0.0
    here: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    attempts: int = 1
    finished: str = ""

    @property
    def ok(self) -> bool:
        """Whether something was found."""
        return self.failure is None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "files": list(self.files), "beside": list(self.beside)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """What ``to_json`` gave."""
        plain = reading.fields(cls, dict(data))
        if plain.get("failure"):
            plain["failure"] = Failure(**plain["failure"])
        return cls(**{**plain, "files": tuple(plain["files"]), "beside": tuple(plain["beside"])})


def execute(task: Task, place: Place) -> Outcome:
    """Do a task in a place; an error of the task's own is an outcome, and not raised.

    The outcome is on disk before this returns, and a task that has one there is not done again:
    so a measurement whose result was lost on its way to the driver is not made twice.
    """
    from sdopt.sweep import provenance, work

    known = finished(task.key, place)
    if known is not None:
        return known
    start = time.perf_counter()
    data: Mapping[str, Any] = {}
    files: tuple[str, ...] = ()
    failure = None
    try:
        found = work.do(task, place)
        data, files, start = found.data, found.files, start + found.waited
    except SdoptError as error:
        failure = Failure.of(error)
    seconds = time.perf_counter() - start
    outcome = Outcome(
        task.key, data, files, failure, seconds, provenance.here(), finished=provenance.now()
    )
    if failure is not None:  # tried again where the driver did not hear of it
        return outcome
    path = place.outcome(task.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    datafile.write_bytes(path, json.dumps(outcome.to_json()).encode())
    return outcome


def finished(key: str, place: Place) -> Outcome | None:
    """The outcome of a task that was finished here, if its files are all there."""
    path = place.outcome(key)
    if not path.is_file():
        return None
    outcome = Outcome.from_json(reading.table(path.read_bytes()))
    there = all((place.root / one).is_file() for one in outcome.files)
    return outcome if there else None
