"""What a bundle says of itself: its stages as they are now, with the reports kept beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt import artifacts, inspection, stage_report
from sdopt.artifacts import Artifact
from sdopt.bundle import RAW, Bundle
from sdopt.errors import UnknownNameError
from sdopt.report import PassReport
from sdopt.spec import suggest

CHECKPOINT = "the checkpoint"


@dataclass(frozen=True)
class Shown:
    """One stage of one component.

    Attributes:
        component: its name.
        facts: what ``inspect`` says of it, ``weight_bytes`` and ``nodes`` with its companions'.
        found: the report of the run that made it, or why there is none.
        outdated: why it is not what its recipe would make of its source now; empty if it is.
    """

    component: str
    facts: dict[str, Any]
    found: stage_report.Found
    outdated: str = ""

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.facts["name"])

    @property
    def source(self) -> str:
        """The stage that it was made from; empty for one made from a checkpoint."""
        return "" if self.facts["made_from"] == CHECKPOINT else str(self.facts["made_from"])

    @property
    def passes(self) -> list[PassReport]:
        """What the passes of the run that made it did, as far as that is known."""
        return self.found.report.component.passes if self.found.report is not None else []


@dataclass(frozen=True)
class Compiled:
    """An artifact and the stage it lies beside (``component`` and ``stage``, where one does)."""

    file: str
    artifact: Artifact
    component: str = ""
    stage: str = ""


@dataclass(frozen=True)
class Gathered:
    """A bundle as the page shows it.

    Attributes:
        bundle: the bundle.
        components: those that are shown.
        lineage: every stage of those, the raw ones first.
        chosen: names of the stages that are shown in full.
        compiled: artifacts.
    """

    bundle: Bundle
    components: tuple[str, ...]
    lineage: tuple[Shown, ...]
    chosen: tuple[str, ...]
    compiled: tuple[Compiled, ...]

    def shown(self) -> Iterator[Shown]:
        """The stages that are shown in full."""
        return (one for one in self.lineage if one.name in self.chosen)

    def others(self) -> list[str]:
        """The chosen stages but the raw one, as the reference of which that serves."""
        return [name for name in self.chosen if name != RAW]

    def has(self, component: str, stage: str) -> bool:
        """Whether a component has a stage."""
        return any((one.component, one.name) == (component, stage) for one in self.lineage)


def gather(
    bundle: Bundle, components: Sequence[str] | None, stages: Sequence[str] | None
) -> Gathered:
    """Read what is known of a bundle's stages; no weight is read.

    Raises:
        UnknownNameError: a component that is not there, or a stage that no component has.
    """
    names = tuple(components or bundle.components)
    lineage: list[Shown] = []
    for name in names:
        bundle.entry(name)
        facts = inspection.inspect(bundle.path, name)["components"][name]["stages"]
        lineage += _component(bundle, name, facts)
    known = tuple(dict.fromkeys(one.name for one in lineage))
    for asked in stages or ():
        if asked not in known:
            raise UnknownNameError(
                f"no component has a stage {asked!r}",
                where=str(bundle.path),
                hint=suggest(asked, known),
            )
    chosen = tuple(dict.fromkeys(stages)) if stages else known
    compiled = [
        one
        for one in (_compiled(bundle, lineage, *found) for found in artifacts.under(bundle.path))
        if not one.component or one.component in names
    ]
    return Gathered(bundle, names, tuple(lineage), chosen, tuple(compiled))


def _component(bundle: Bundle, name: str, facts: list[dict[str, Any]]) -> Iterator[Shown]:
    by_name = {str(one["name"]): one for one in facts}
    for one in facts:
        companions = one.get("companions", [])
        for what in ("nodes", "weight_bytes"):
            one[what] += sum(each[what] for each in companions)
        found = stage_report.find(bundle.file(name, one["name"]), one["digest"])
        yield Shown(name, one, found, _outdated(one, by_name))


def _outdated(
    one: dict[str, Any], by_name: dict[str, dict[str, Any]], seen: tuple[str, ...] = ()
) -> str:
    source = str(one["made_from"])
    if source == CHECKPOINT or source in seen:
        return ""
    if source not in by_name:
        return f"its source {source} is gone"
    if one["stale"]:
        return f"its source {source} has changed since"
    if _outdated(by_name[source], by_name, (*seen, source)):
        return f"its source {source} is stale itself"
    return ""


def _compiled(bundle: Bundle, lineage: list[Shown], path: Path, artifact: Artifact) -> Compiled:
    file = str(path.relative_to(bundle.path))
    for one in lineage:
        if bundle.file(one.component, one.name).with_suffix("") == path.with_suffix(""):
            return Compiled(file, artifact, one.component, one.name)
    return Compiled(file, artifact, str(artifact.facts.get("component", "")))
