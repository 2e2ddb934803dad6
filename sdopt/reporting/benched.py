"""The section of a benchmark: the JSON of ``sdopt bench``, with what has changed since."""

from __future__ import annotations

from pathlib import Path

from sdopt import reading
from sdopt.bench import BenchReport, text
from sdopt.bench.tables import Row
from sdopt.bundle import Bundle
from sdopt.drawing.page import Cell, Page
from sdopt.errors import UsageError

_HOW = "make one: sdopt bench BUNDLE --json > bench.json"


def read(path: Path) -> BenchReport:
    """The report in a file.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    try:
        data = reading.table(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            "there is no JSON of sdopt bench here", where=str(path), why=str(error), hint=_HOW
        ) from error
    return BenchReport.from_json(data)


def benchmark(page: Page, bundle: Bundle, report: BenchReport) -> None:
    """Its tables and charts, and whether it measured the stages that the bundle holds now."""
    page.section("Benchmark")
    page.text(f"Measured before this page: {text.about(report)}.")
    page.text(text.HOW)
    page.table(
        ["row", "target", "components", "state"],
        [
            [row.label, row.target, ", ".join(row.digests), _state(bundle, row)]
            for row in report.rows
        ],
    )
    for one in report.components:
        _figures(page, f"{one.component}, milliseconds per call", text.table(one))
    if report.images is not None:
        _figures(page, "Whole images, seconds each", text.table(report.images))
    if memory := text.memory(report):
        _figures(page, "Memory, MB, each row in a process of its own", memory)
    for chart in report.charts():
        page.chart(chart)
    for note in report.notes:
        page.text(note)
    with page.folded("Where and how it was measured"):
        page.table(["", ""], text.facts(report))
        if report.command:
            page.code(report.command)


def _figures(page: Page, title: str, rows: list[tuple[str, ...]]) -> None:
    page.heading(title)
    page.table(rows[0], rows[1:])


def _state(bundle: Bundle, row: Row) -> Cell:
    changed = [
        name
        for name, digest in row.digests.items()
        if name not in bundle.components
        or row.stage not in bundle.stages(name)
        or bundle.stage(name, row.stage).digest != digest
    ]
    if changed:
        return Cell(f"STALE: not the {', '.join(changed)} that the bundle holds now", "bad")
    return Cell("of the stages as they are")
