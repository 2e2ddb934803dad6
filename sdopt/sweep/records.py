"""A task of a sweep and what came of it, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sdopt import reading
from sdopt.errors import SdoptError

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
        work: what to do, by kind; see the module of the kind.
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
        data: what was found, by kind; see the module of the kind.
        files: what it made, paths relative to the place's root, data files before graphs, and last
            ``outcomes/KEY.json``, which tasks that need it read.
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


@dataclass(frozen=True)
class Found:
    """What a task found.

    Attributes:
        data: plain data.
        files: that it made, relative to the place's root, data files before graphs.
        waited: seconds that it waited for a lock.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    waited: float = 0.0
