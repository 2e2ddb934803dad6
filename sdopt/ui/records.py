"""What a job is: the calls it makes, how far it is, what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from sdopt import reading
from sdopt.errors import SdoptError

VERBS = ("fetch", "export", "optimize", "build", "run", "compare", "pack", "bench", "report")
"""What a call may be; ``sdopt.ui.verbs`` says how each is carried out."""


class State(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing comes after it."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True)
class Call:
    """One verb of ``sdopt.api`` and its arguments as JSON has them, paths relative to the root."""

    verb: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One step of the way: ``seconds`` since the job started, the call's number, what, share.

    ``share`` is that of the whole job, 0 to 1.
    """

    seconds: float
    step: int
    what: str
    share: float


@dataclass(frozen=True)
class JobError:
    """Why a job failed, as ``SdoptError`` says it."""

    what: str
    where: str | None = None
    why: str | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: SdoptError) -> JobError:
        """The same in words."""
        return cls(error.message, error.where, error.why, error.hint)


@dataclass(frozen=True)
class JobView:
    """A job as it was when it was read from disk; nothing here changes any more.

    Attributes:
        id: ``20260131-235959-0a1b2c``; sorts by the time of asking.
        bundle: the name of its bundle's folder.
        title: what it is, for people.
        state: where it stands.
        calls: what it does, in this order.
        queued, started, ended: seconds since 1970; the first start if there were several.
        step: the number of the call that it is at, from 0.
        what: what is being done, or was last.
        share: how much is done, 0 to 1 over all calls.
        events: the last of them; empty in a list of jobs.
        log: the end of its log; empty in a list of jobs.
        results: what each finished call reported; empty in a list of jobs.
        error: why it failed.
    """

    id: str
    bundle: str
    title: str
    state: State
    calls: tuple[Call, ...]
    queued: float | None
    started: float | None = None
    ended: float | None = None
    step: int = 0
    what: str = ""
    share: float = 0.0
    events: tuple[Event, ...] = ()
    log: str = ""
    results: tuple[dict[str, Any], ...] = ()
    error: JobError | None = None


@dataclass(frozen=True)
class Asked:
    """What somebody asked for; it never changes."""

    title: str
    calls: tuple[Call, ...]
    queued: float

    def dumps(self) -> bytes:
        """As JSON.

        Raises:
            TypeError, ValueError: an argument is nothing that JSON has.
        """
        return json.dumps(asdict(self), allow_nan=False).encode()

    @classmethod
    def loads(cls, data: bytes) -> Asked:
        """What ``dumps`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        plain = reading.fields(cls, reading.table(data))
        plain["calls"] = tuple(Call(**reading.fields(Call, one)) for one in plain["calls"])
        return cls(**plain)


@dataclass(frozen=True)
class Line:
    """An event as it lies on disk; ``at`` is in seconds since 1970."""

    at: float
    step: int
    what: str
    share: float

    @classmethod
    def loads(cls, data: bytes) -> Line | None:
        """One line of the file; None where it was torn when the machine went down."""
        try:
            return cls(**reading.fields(cls, reading.table(data)))
        except (TypeError, ValueError):
            return None

    def dumps(self) -> bytes:
        """As one line."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class End:
    """How a job ended, and when."""

    state: State
    ended: float | None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> End:
        """Read it from JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        plain = reading.fields(cls, data)
        state = State(plain["state"])
        if not state.final:
            raise ValueError(f"{state} is no end")
        return cls(state, plain["ended"])
