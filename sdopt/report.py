"""What a run did, as data: per pass the time, the counts, the rewrites and what was left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdopt import reading

Progress = Callable[[str, float], None]
"""Is told what a verb does now, and which share of it is done (0 to 1)."""


def part(progress: Progress | None, index: int, count: int, label: str = "") -> Progress:
    """The progress of part ``index`` of ``count`` as progress of the whole."""

    def tell(what: str, share: float) -> None:
        if progress:
            progress(f"{label}: {what}" if label else what, (index + share) / count)

    return tell


@dataclass(frozen=True)
class Skip:
    """A place that a pass left alone: the reason in words a user can act on, and where.

    ``kind`` is the kind of thing that the place is (``attention``), as in ``PassReport.rewrites``;
    empty where the pass does not say.
    """

    reason: str
    where: str
    kind: str = ""


def is_kind(word: str) -> bool:
    """Whether a word names a kind of place (``group_norm``); other words only tally."""
    return word.isidentifier()


@dataclass(frozen=True)
class Coverage:
    """How much of one kind a pass covered.

    ``rewritten`` are the places that this run gave the form the pass makes, ``present`` those that
    had it before; ``left`` are those that were found and left alone.
    """

    kind: str
    rewritten: int
    present: int
    left: tuple[Skip, ...]

    @property
    def done(self) -> int:
        """The places that have the form the pass makes, by this run or before it."""
        return self.rewritten + self.present

    @property
    def found(self) -> int:
        """Every place of the kind, done or left."""
        return self.done + len(self.left)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the counts first."""
        counts = ("kind", "found", "done", "rewritten", "present")
        left = [{"reason": one.reason, "where": one.where} for one in self.left]
        return {**{name: getattr(self, name) for name in counts}, "left": left}


@dataclass(frozen=True)
class Verdict:
    """Whether one requirement was met; ``why`` are lines for people, empty where it was.

    ``done`` and ``found`` count over the components, for the pass that did worst.
    """

    requirement: str
    met: bool
    done: int
    found: int
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassReport:
    """One pass over one component.

    ``rewrites`` maps what was rewritten to how often: a kind in one word (``attention``), whose
    places are found, done or left, or words that only tally (``no-op removed``). ``present`` maps
    the kind of what had the wanted form already. ``ops_before`` and ``ops_after`` count operators;
    ``new_bytes`` are bytes of computed weights still to be written; ``seconds`` is wall time;
    ``reads`` are digests of the files that the options name, and the run's seed if it decides too.
    """

    spec: str
    numerics: str
    seconds: float
    nodes_before: int
    nodes_after: int
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    rewrites: dict[str, int]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    new_bytes: int
    changed: bool
    present: dict[str, int] = field(default_factory=dict)
    intent: str = "same"
    reads: tuple[str, ...] = ()

    def coverage(self) -> list[Coverage]:
        """What was found and what became of it, kind by kind."""
        kinds = dict.fromkeys([*self.rewrites, *self.present, *(s.kind for s in self.skips)])
        return [
            Coverage(
                kind,
                self.rewrites.get(kind, 0),
                self.present.get(kind, 0),
                tuple(skip for skip in self.skips if skip.kind == kind),
            )
            for kind in kinds
            if is_kind(kind)
        ]

    def tallies(self) -> dict[str, int]:
        """The rewrites that are of no kind."""
        return {what: times for what, times in self.rewrites.items() if not is_kind(what)}

    def op_deltas(self) -> dict[str, int]:
        """Operators whose count changed, as after minus before."""
        names = self.ops_before.keys() | self.ops_after.keys()
        deltas = {n: self.ops_after.get(n, 0) - self.ops_before.get(n, 0) for n in sorted(names)}
        return {name: delta for name, delta in deltas.items() if delta}

    def to_json(self) -> dict[str, Any]:
        """Plain data, with ``coverage`` beside what it is computed from."""
        return {**dataclasses.asdict(self), "coverage": [one.to_json() for one in self.coverage()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PassReport:
        """What ``to_json`` wrote; fields of a later release are left out.

        Raises:
            KeyError, TypeError: it is something else.
        """
        plain = reading.fields(cls, data)
        plain["skips"] = tuple(Skip(**reading.fields(Skip, one)) for one in data["skips"])
        for name in ("notes", "reads"):
            plain[name] = tuple(data[name])
        return cls(**plain)


@dataclass
class ComponentReport:
    """One component through one verb; ``bytes_written`` are what the commit put on disk.

    ``digest`` is that of the stage on disk, empty where none was written.
    """

    component: str
    stage: str
    file: str = ""
    digest: str = ""
    seconds: float = 0.0
    nodes: int = 0
    bytes_written: int = 0
    up_to_date: bool = False
    passes: list[PassReport] = field(default_factory=list)
    artifact: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data, each pass with its ``coverage``."""
        return {**dataclasses.asdict(self), "passes": [one.to_json() for one in self.passes]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ComponentReport:
        """What ``to_json`` wrote; fields of a later release are left out.

        Raises:
            KeyError, TypeError: it is something else.
        """
        plain = reading.fields(cls, data)
        plain["notes"] = [str(note) for note in data["notes"]]
        plain["passes"] = [PassReport.from_json(one) for one in data["passes"]]
        return cls(**plain)


@dataclass
class Report:
    """What one verb did to a bundle or a file."""

    verb: str
    bundle: str
    components: list[ComponentReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    requirements: list[Verdict] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether every requirement was; without one, always."""
        return all(verdict.met for verdict in self.requirements)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for ``json.dumps``; each pass with its ``coverage``."""
        components = [one.to_json() for one in self.components]
        return {**dataclasses.asdict(self), "components": components, "met": self.met}
