"""The section that says what the bundle is, what came from what, and how to make it again."""

from __future__ import annotations

import shlex

from sdopt.drawing.charts import Chart, axis, tree
from sdopt.drawing.page import Cell, Page
from sdopt.reporting.gather import Gathered, Shown
from sdopt.stage_report import BUNDLE
from sdopt.units import size

_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What the raw stage's record says, as the others' say it."""

_DIGITS = 8
"""Of a digest in a picture; the table has all of them."""


def overview(page: Page, all_: Gathered) -> None:
    """What the bundle is made of."""
    manifest = all_.bundle.manifest
    page.section("Overview")
    page.table(
        ["", ""],
        [
            ["exported from", manifest.origin or "not known"],
            ["family", manifest.family or "not known"],
            ["components", ", ".join(_role(all_, name) for name in all_.components)],
            ["stages", ", ".join(dict.fromkeys(one.name for one in all_.lineage))],
            ["manifest written by sdopt", manifest.sdopt or "not known"],
        ],
        caption="The bundle",
    )
    page.chart(_lineage(all_))
    heads = ["component", "stage", "made from", "passes", "type", "opset", "nodes", "weights"]
    page.table(
        [*heads, "digest", "state"],
        [_row(one) for one in all_.lineage],
        caption="Stages; weights are what the graph uses, shared between stages on disk",
    )
    page.heading("Commands")
    _commands(page, all_)


def _role(all_: Gathered, name: str) -> str:
    role = all_.bundle.entry(name).role
    return name if role == name.replace("_", " ") else f"{name} ({role})"


def _type(one: Shown) -> str:
    dtype = str(one.facts["dtype"])
    return _TYPES.get(dtype, dtype)


def _row(one: Shown) -> list[object]:
    facts = one.facts
    return [
        one.component,
        one.name,
        one.source or "checkpoint",
        ", ".join(facts["history"]) or "none",
        _type(one),
        facts["opset"],
        facts["nodes"],
        size(facts["weight_bytes"]),
        facts["digest"],
        Cell(f"STALE: {one.outdated}", "bad") if one.outdated else "current",
    ]


def _lineage(all_: Gathered) -> Chart:
    rows = [
        {"id": name, "label": name, "below": all_.bundle.entry(name).role, "is": "component"}
        for name in all_.components
    ]
    for one in all_.lineage:
        facts = one.facts
        below = f"{_type(one)}, {size(facts['weight_bytes'])}, {facts['digest'][:_DIGITS]}"
        rows.append(
            {
                "id": f"{one.component}/{one.name}",
                "parent": f"{one.component}/{one.source}" if one.source else one.component,
                "label": f"{one.name} (stale)" if one.outdated else one.name,
                "below": below,
                "is": "stale stage" if one.outdated else "stage",
            }
        )
    rows += [
        {
            "id": made.file,
            "parent": f"{made.component}/{made.stage}" if made.stage else made.component,
            "label": made.file.rpartition("/")[2],
            "below": f"artifact, {size(made.artifact.size)}, {made.artifact.digest[:_DIGITS]}",
            "is": "artifact",
        }
        for made in all_.compiled
    ]
    stale = sum(1 for one in all_.lineage if one.outdated)
    return tree(
        "What came from what",
        rows,
        color=axis("is", "", kind="nominal"),
        tooltip=["id", "below", "is"],
        texts=f"{len(all_.lineage)} stages, {stale} of them stale, and {len(all_.compiled)} "
        "artifacts, each to the right of what it was made from.",
    )


def _commands(page: Page, all_: Gathered) -> None:
    """The commands of the runs that made the stages, each once, in the order of the stages."""
    lines: dict[str, None] = {}
    missing: dict[str, list[str]] = {}
    for one in _in_order(all_):
        if one.found.report is None:
            missing.setdefault(one.found.why, []).append(f"{one.component}@{one.name}")
            continue
        words = [str(all_.bundle.path) if w == BUNDLE else w for w in one.found.report.command]
        lines[shlex.join(["sdopt", *words])] = None
    if lines:
        page.text("The runs that made these stages, in the folder that they were started in:")
        page.code("\n".join(lines))
    for why, names in missing.items():
        page.text(
            f"{', '.join(names)}: {why}. What its passes found and what they cost is not known; "
            "make it again and it is kept: sdopt optimize --force (export and adopt: into a new "
            "bundle; build: sdopt build --force).",
            tone="bad",
        )


def _in_order(all_: Gathered) -> list[Shown]:
    """Stages behind the stages that they were made from."""
    place = {(one.component, one.name): one for one in all_.lineage}

    def depth(one: Shown) -> int:
        seen = {one.name}
        while (source := place.get((one.component, one.source))) is not None:
            if source.name in seen:  # made from each other, in turn
                break
            seen.add(source.name)
            one = source
        return len(seen)

    return sorted(all_.lineage, key=depth)
