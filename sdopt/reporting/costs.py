"""The section that says what making the stages and artifacts cost: time, bytes, memory."""

from __future__ import annotations

import json

from sdopt.drawing.charts import axis, bars
from sdopt.drawing.page import Page
from sdopt.reporting.gather import Compiled, Gathered
from sdopt.units import seconds, size

NOT_RUN = (
    "Artifacts of a compiler are not run by this page: its numbers and images are those of the "
    "graphs, by ONNX Runtime on the CPU. sdopt run and sdopt bench run them where their card is."
)


def costs(page: Page, all_: Gathered) -> None:
    """Seconds, bytes and memory of the runs that made the stages."""
    page.section("Time and memory")
    known = [(one, one.found.report) for one in all_.shown() if one.found.report is not None]
    unknown = [f"{one.component}@{one.name}" for one in all_.shown() if one.found.report is None]
    if known:
        page.table(
            ["stage", "verb", "wall time", "weights written", "peak RSS so far", "when", "where"],
            [
                [
                    f"{one.component}@{one.name}",
                    found.verb,
                    seconds(found.component.seconds),
                    size(found.component.bytes_written),
                    size(found.peak_rss_bytes),
                    found.written.replace("T", " ").replace("+00:00", " UTC"),
                    found.machine,
                ]
                for one, found in known
            ],
            caption="Peak RSS is of the whole process up to then, so later components of one run "
            "hold at least what earlier ones did",
        )
    rows = [
        {
            "stage": f"{one.component}@{one.name}",
            "pass": f"{number}. {each.spec}",
            "seconds": each.seconds,
        }
        for one, found in known
        for number, each in enumerate(found.component.passes, 1)
    ]
    if rows:
        page.chart(
            bars(
                "Seconds per pass",
                rows,
                axis("stage", "", kind="nominal"),
                axis("seconds", "seconds"),
                color=axis("pass", "", kind="nominal"),
                stacked=True,
                tooltip=["stage", "pass", "seconds"],
                texts="Wall time of the passes, by stage; reading and writing are not in it.",
            )
        )
    if unknown:
        page.text(f"Not known, since no report of theirs is kept: {', '.join(unknown)}.")
    if all_.compiled:
        _artifacts(page, all_.compiled)


def _artifacts(page: Page, compiled: tuple[Compiled, ...]) -> None:
    page.heading("Artifacts")
    page.table(
        ["file", "of stage", "size", "compile time", "attentions fused", "compiler"],
        [
            [
                one.file,
                f"{one.component}@{one.stage}" if one.stage else one.component or "not known",
                size(one.artifact.size),
                seconds(one.artifact.seconds),
                _fused(one),
                ", ".join(f"{name} {text}" for name, text in one.artifact.versions.items()),
            ]
            for one in compiled
        ],
    )
    for one in compiled:
        lines = [f"{key}: {_plain(value)}" for key, value in one.artifact.facts.items()]
        if lines:
            page.details(f"{one.file}: what the compiler said", lines)
    page.text(NOT_RUN)


def _fused(one: Compiled) -> str:
    facts = one.artifact.facts
    if not facts.get("attentions"):
        return "not said"
    return f"{facts.get('attentions_fused', 0)} of {facts['attentions']}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
