"""What a run of passes must have covered: ``attention=all,geglu=16``, parsed and judged.

Each pass that speaks of the kind is judged by its last run that did: of a pass that runs twice the
second run sees what the first left, while two passes (one that raises attentions, one that lowers
them) must each have covered theirs. Counts add up over the components. They come from the graph,
never from a table of known models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdopt import spec
from sdopt.errors import RequirementError
from sdopt.report import ComponentReport, Coverage, Report, Skip, Verdict, is_kind

ALL = "all"
_REASONS = 3
"""How many reasons a verdict tells; the report holds every one."""


@dataclass(frozen=True)
class Requirement:
    """A kind of place, and how many of it must be done: ``count``, or all that were found.

    All means at least one, in any of the components, and none left in one of them.
    """

    kind: str
    count: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}={ALL if self.count is None else self.count}"


def parse_requirements(text: str) -> tuple[Requirement, ...]:
    """Read ``KIND=all`` and ``KIND=N``, joined by commas.

    Raises:
        SpecError: with a caret under what cannot be read.
    """
    found: dict[str, Requirement] = {}
    for item in spec.parse(text):
        if not is_kind(item.name):
            raise item.error(f"{item.name} is no kind", hint="write a kind as reports do: geglu")
        if item.options:
            raise item.error("a requirement has no options", hint="write KIND=all or KIND=N")
        if item.value is None:
            raise item.error(
                f"how many of {item.name}?", hint=f"write {item.name}=all or {item.name}=N"
            )
        count = "+".join(item.value)
        if count != ALL and not count.isdecimal():
            raise item.error(f"{item.name} must be {ALL} or a whole number, not {count!r}")
        if item.name in found:
            raise item.error(f"{item.name} is required twice")
        found[item.name] = Requirement(item.name, None if count == ALL else int(count))
    if not found:
        raise spec.pointed("nothing is required", text, (0, len(text)), hint="write KIND=all")
    return tuple(found.values())


def judge(required: Sequence[Requirement], components: Sequence[ComponentReport]) -> list[Verdict]:
    """A verdict per requirement, over what the passes said of all the components."""
    return [_judge(one, components) for one in required]


def enforce(report: Report) -> None:
    """Refuse a report with a requirement that was not met.

    Raises:
        RequirementError: with kind, counts, the first places and their reasons.
    """
    unmet = [verdict for verdict in report.requirements if not verdict.met]
    if not unmet:
        return
    names = " and ".join(verdict.requirement for verdict in unmet)
    raise RequirementError(
        f"{names} {'is' if len(unmet) == 1 else 'are'} not met, so nothing was written",
        where=report.bundle,
        why="\n".join(line for verdict in unmet for line in verdict.why),
        hint="--json lists every place; without --require the result is written as it is",
    )


@dataclass(frozen=True)
class _Said:
    """What the last run of one pass said of a kind in one component."""

    component: str
    spec: str
    coverage: Coverage


def _judge(one: Requirement, components: Sequence[ComponentReport]) -> Verdict:
    by_pass = _what_was_said(one.kind, components)
    if not by_pass:
        return _nothing_found(one, components)
    verdicts = [_judge_pass(one, said) for said in by_pass.values()]
    worst = min(verdicts, key=lambda verdict: (verdict.met, verdict.done - verdict.found))
    why = tuple(line for verdict in verdicts for line in verdict.why)
    return Verdict(str(one), all(v.met for v in verdicts), worst.done, worst.found, why)


def _judge_pass(one: Requirement, said: Sequence[_Said]) -> Verdict:
    """The verdict on one pass over all components."""
    done = sum(each.coverage.done for each in said)
    found = sum(each.coverage.found for each in said)
    if done == (found if one.count is None else one.count):
        return Verdict(str(one), True, done, found)
    first = f"{one.kind}: {said[0].spec} has {done} of {found} done"
    if one.count is not None:
        first += f", not {one.count}"
    return Verdict(str(one), False, done, found, (first, *_reasons(said)))


def _reasons(said: Sequence[_Said]) -> Iterator[str]:
    places: dict[tuple[str, str], list[Skip]] = {}
    for each in said:
        for skip in each.coverage.left:
            places.setdefault((each.component, skip.reason), []).append(skip)
    for (component, reason), skips in list(places.items())[:_REASONS]:
        more = f" and {len(skips) - 1} more" if len(skips) > 1 else ""
        yield f"  {reason} (at {skips[0].where}{more}, {component})"
    if len(places) > _REASONS:
        yield f"  and {len(places) - _REASONS} other reasons"


def _nothing_found(one: Requirement, components: Sequence[ComponentReport]) -> Verdict:
    known = {c.kind for each in components for report in each.passes for c in report.coverage()}
    hint = spec.suggest(one.kind, known)
    why = f"no {one.kind} was found{f' ({hint})' if hint else ''}"
    return Verdict(str(one), one.count == 0, 0, 0, () if one.count == 0 else (why,))


def _what_was_said(kind: str, components: Sequence[ComponentReport]) -> dict[str, list[_Said]]:
    """Pass name to what its last run that spoke of the kind said, component by component."""
    found: dict[str, list[_Said]] = {}
    for component in components:
        last: dict[str, _Said] = {}
        for one in component.passes:
            for coverage in one.coverage():
                if coverage.kind == kind:
                    name = spec.parse(one.spec)[0].name
                    last[name] = _Said(component.component, one.spec, coverage)
        for name, said in last.items():
            found.setdefault(name, []).append(said)
    return found
