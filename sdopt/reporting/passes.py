"""The section that says what each pass did: operators, coverage, what was left and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdopt.drawing.charts import Chart, axis, bars
from sdopt.drawing.page import Page
from sdopt.report import PassReport, Skip
from sdopt.reporting.gather import Gathered, Shown
from sdopt.units import seconds, size

OPS_DRAWN = 12
"""Operators in a chart, those whose count changed most; the table beside it has all."""


def passes(page: Page, all_: Gathered) -> None:
    """What the passes did to each component, stage by stage."""
    page.section("Passes")
    page.text(
        "From the reports that the runs left beside the stages. Found and done counts the places "
        "of a kind that have the form the pass makes, of those that there are."
    )
    for name in all_.components:
        for one in all_.shown():
            if one.component == name and (one.passes or one.found.report is None):
                _stage(page, one)


def _stage(page: Page, one: Shown) -> None:
    page.heading(f"{one.component}, stage {one.name}")
    if one.found.report is None:
        page.text(
            f"{one.found.why}: what its passes found is not known. Its record names them: "
            f"{', '.join(one.facts['history']) or 'none'}. Run the command that made it again "
            "with --force (sdopt optimize --force), and the report is kept.",
            tone="bad",
        )
        return
    if one.outdated:
        page.text(f"This stage is stale: {one.outdated}.", tone="bad")
    heads = ["pass", "numerics", "nodes before", "nodes after", "found and done", "left"]
    page.table(
        [*heads, "seconds", "weights computed"],
        [_row(each) for each in one.passes],
        caption=f"{one.component}@{one.name}, made from {one.source or 'the checkpoint'}",
    )
    states = _states(one.passes)
    changed = _changed(states)
    if changed:
        page.chart(_chart(one, states, changed))
        with page.folded(f"Counts of all {len(changed)} operators that changed"):
            page.table(
                ["operator", *(label for label, _ in states)],
                [[op, *(ops.get(op, 0) for _, ops in states)] for op in changed],
            )
    for each in one.passes:
        _left(page, each)
    _remarks(page, one.passes)
    for note in one.found.report.component.notes:
        page.text(note)


def _row(one: PassReport) -> list[object]:
    kinds = [f"{each.kind} {each.done}/{each.found}" for each in one.coverage()]
    tallies = "" if kinds or not one.rewrites else f"{sum(one.rewrites.values())} rewrites"
    return [
        one.spec,
        one.numerics,
        one.nodes_before,
        one.nodes_after,
        "; ".join(kinds) or tallies or "nothing to do",
        len(one.skips),
        seconds(one.seconds),
        size(one.new_bytes),
    ]


States = Sequence[tuple[str, Mapping[str, int]]]
"""Operator counts before the first pass and after each that changed some."""


def _states(reports: Sequence[PassReport]) -> States:
    states: list[tuple[str, Mapping[str, int]]] = [("before", reports[0].ops_before)]
    for number, one in enumerate(reports, 1):
        if one.op_deltas():
            states.append((f"{number}. after {one.spec}", one.ops_after))
    return states


def _changed(states: States) -> list[str]:
    """Operators whose count is not the same in all states, the largest change first."""
    names = {op: None for _, ops in states for op in ops}

    def spread(op: str) -> int:
        counts = [ops.get(op, 0) for _, ops in states]
        return max(counts) - min(counts)

    return sorted((op for op in names if spread(op)), key=lambda op: (-spread(op), op))


def _chart(one: Shown, states: States, changed: Sequence[str]) -> Chart:
    drawn = changed[:OPS_DRAWN]
    rows = [
        {"operator": op, "count": ops.get(op, 0), "when": label}
        for op in drawn
        for label, ops in states
    ]
    more = f" The {len(drawn)} of {len(changed)} that changed most." * (len(drawn) < len(changed))
    return bars(
        f"Operators of {one.component}@{one.name}, before and after",
        rows,
        axis("operator", "", kind="nominal"),
        axis("count", "nodes"),
        color=axis("when", "", kind="nominal"),
        tooltip=["operator", "when", "count"],
        texts=f"Nodes per operator before the passes and after each that changed a count.{more}",
    )


def _left(page: Page, one: PassReport) -> None:
    """Near misses, folded by reason: what was found and left alone, and where."""
    reasons: dict[tuple[str, str], list[Skip]] = {}
    for skip in one.skips:
        reasons.setdefault((skip.kind, skip.reason), []).append(skip)
    for (kind, reason), places in reasons.items():
        what = f"{len(places)} {kind or 'places'} left"
        page.details(f"{one.spec}: {what}: {reason}", [skip.where for skip in places])


def _remarks(page: Page, reports: Sequence[PassReport]) -> None:
    lines = []
    for one in reports:
        lines += [f"{one.spec}: {times} x {what}" for what, times in one.tallies().items()]
        lines += [
            f"{one.spec}: {each.present} of {each.found} {each.kind} had the form already"
            for each in one.coverage()
            if each.present
        ]
        lines += [f"{one.spec}: {note}" for note in one.notes]
    if lines:
        page.details("What else the passes counted and noted", lines)
