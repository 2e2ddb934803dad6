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
    """A place that a pass left alone: the reason in words a user can act on, and where."""

    reason: str
    where: str


@dataclass(frozen=True)
class PassReport:
    """One pass over one component.

    ``rewrites`` maps what was rewritten (``self-attention qkv``) to how often; ``ops_before`` and
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
