"""What a run did, as data: per pass the time, the counts, the rewrites and what was left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Coverage:
    """How much of one kind a pass covered.

    ``done`` are the places that have the form the pass makes, ``rewritten`` of them by this run;
    ``left`` are those that were found and left alone.
    """

    kind: str
    rewritten: int
    done: int
    left: tuple[Skip, ...]

    @property
    def found(self) -> int:
        """Every place of the kind, done or left."""
        return self.done + len(self.left)


@dataclass(frozen=True)
class PassReport:
    """One pass over one component.

    ``rewrites`` maps the kind of what was rewritten (``attention``) to how often, ``present`` the
    kind of what had the wanted form already; ``ops_before`` and
    ``ops_after`` count operators; ``new_bytes`` are bytes of computed weights still to be written;
    ``seconds`` is wall time.
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

    def coverage(self) -> list[Coverage]:
        """What was found and what became of it, kind by kind, for the kinds of skips that say."""
        kinds = dict.fromkeys([*self.rewrites, *self.present, *(s.kind for s in self.skips)])
        return [
            Coverage(
                kind,
                self.rewrites.get(kind, 0),
                self.rewrites.get(kind, 0) + self.present.get(kind, 0),
                tuple(skip for skip in self.skips if skip.kind == kind),
            )
            for kind in kinds
            if kind
        ]

    def op_deltas(self) -> dict[str, int]:
        """Operators whose count changed, as after minus before."""
        names = self.ops_before.keys() | self.ops_after.keys()
        deltas = {n: self.ops_after.get(n, 0) - self.ops_before.get(n, 0) for n in sorted(names)}
        return {name: delta for name, delta in deltas.items() if delta}


@dataclass
class ComponentReport:
    """One component through one verb; ``bytes_written`` are what the commit put on disk."""

    component: str
    stage: str
    file: str = ""
    digest: str = ""
    seconds: float = 0.0
    nodes: int = 0
    bytes_written: int = 0
    up_to_date: bool = False
    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What one verb did to a bundle or a file."""

    verb: str
    bundle: str
    components: list[ComponentReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for ``json.dumps``."""
        return dataclasses.asdict(self)
