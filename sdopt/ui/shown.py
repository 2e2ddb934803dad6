"""A job and what came of it as HTML; whatever is put in is escaped."""

from __future__ import annotations

import base64
import functools
import html
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, Template

from sdopt.drawing import charts
from sdopt.errors import SdoptError
from sdopt.report import ComponentReport, PassReport, Report
from sdopt.ui.jobs import JobView
from sdopt.ui.strings import say
from sdopt.units import size

MOST_OPERATORS = 12
"""Operators of a chart: those whose count changed most."""
MOST_LEFT = 40


@dataclass(frozen=True)
class Table:
    """What one call did to one component, with the places that passes left alone and a chart."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    chart: str = ""
    chart_title: str = ""


Say = Callable[[str], str]
"""A text of the page in the reader's language, by its key."""


@functools.cache
def _template() -> Template:
    loader = PackageLoader("sdopt.ui", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("job.jinja")


def job_html(job: JobView | None, language: str = "en") -> str:
    """The whole of a job: state, progress, error, results, log."""
    texts = functools.partial(say, language=language)
    if job is None:
        return _template().render(job=None, say=texts)
    took = None
    if job.started is not None:
        took = (job.ended or time.time()) - job.started
    tables = [table for result in job.results for table in _tables(texts, result)]
    return _template().render(job=job, took=took, tables=tables, events=_told(job), say=texts)


def notice_html(text: str, error: SdoptError | None = None, language: str = "en") -> str:
    """A line about what was just done, or an error with where, why and what to do."""
    if error is None:
        return f'<p role="status">{html.escape(text)}</p>' if text else ""
    lines = [f"<p><strong>{html.escape(error.message)}</strong></p><dl>"]
    for label, value in (("where", error.where), ("why", error.why), ("hint", error.hint)):
        if value:
            lines.append(f"<dt>{say(label, language)}</dt><dd>{html.escape(value)}</dd>")
    return f'<div class="alert" role="alert">{"".join(lines)}</dl></div>'


def _told(job: JobView) -> list[Any]:
    """The events, one per thing that was done, however often its share was told."""
    found: list[Any] = []
    for event in job.events:
        if not found or found[-1].what != event.what:
            found.append(event)
    return found


def _tables(texts: Say, result: Mapping[str, Any]) -> Iterator[Table]:
    """What a call gave back, as tables; what is no report of components has none."""
    if "components" not in result or "verb" not in result:
        return
    report = Report(
        result["verb"],
        result["bundle"],
        [ComponentReport.from_json(one) for one in result["components"]],
        list(result["notes"]),
        result["seconds"],
    )
    heads = tuple(map(texts, ("component", "one_stage", "seconds", "nodes", "written")))
    rows = tuple(_row(texts, one) for one in report.components)
    yield Table(report.verb, heads, rows, lines=tuple(report.notes))
    for one in report.components:
        if one.passes:
            yield _passes(texts, one)


def _row(texts: Say, one: ComponentReport) -> tuple[str, ...]:
    artifact = one.artifact.get("file", "")
    written = size(one.artifact["size"]) if artifact else size(one.bytes_written)
    state = texts("up_to_date") if one.up_to_date else written
    return (one.component, one.stage, f"{one.seconds:.1f}", str(one.nodes), state)


def _passes(texts: Say, one: ComponentReport) -> Table:
    heads = tuple(map(texts, ("pass", "seconds", "before", "after", "rewritten", "left_alone")))
    left = [f"{p.spec}: {s.reason} ({s.where})" for p in one.passes for s in p.skips]
    if len(left) > MOST_LEFT:
        left = [*left[:MOST_LEFT], f"... {len(left) - MOST_LEFT}"]
    title = f"{one.component}: {texts('operators')}"
    return Table(
        one.component,
        heads,
        tuple(map(_pass, one.passes)),
        lines=tuple(dict.fromkeys(note for p in one.passes for note in p.notes)),
        left=tuple(left),
        chart=_chart(texts, title, one.passes),
        chart_title=title,
    )


def _pass(one: PassReport) -> tuple[str, ...]:
    done = [f"{kind.kind} {kind.done}/{kind.found}" for kind in one.coverage()]
    done += [f"{what} {times}" for what, times in one.tallies().items()]
    nodes = (str(one.nodes_before), str(one.nodes_after))
    return (one.spec, f"{one.seconds:.2f}", *nodes, ", ".join(done), str(len(one.skips)))


def _chart(texts: Say, title: str, passes: list[PassReport]) -> str:
    """Operators before the first and after the last pass as a picture; empty if none changed."""
    before, after = passes[0].ops_before, passes[-1].ops_after
    changed = [name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0)]
    changed.sort(key=lambda name: -abs(after.get(name, 0) - before.get(name, 0)))
    rows = [
        {"operator": name, "count": found.get(name, 0), "when": texts(when)}
        for name in changed[:MOST_OPERATORS]
        for when, found in (("before", before), ("after", after))
    ]
    if not rows:
        return ""
    drawn = charts.bars(
        title,
        rows,
        charts.axis("operator", "", kind="nominal"),
        charts.axis("count", texts("nodes")),
        color=charts.axis("when", "", kind="nominal"),
    )
    return f"data:image/png;base64,{base64.b64encode(drawn.png(1.5)).decode()}"


def link_html(path: Path, label: str) -> str:
    """A link to a file that the server may give out, with its size."""
    address = f"/files/{quote(path.name)}"
    name = html.escape(path.name)
    text = f"{html.escape(label)}: {name} ({size(path.stat().st_size)})"
    return f'<a href="{html.escape(address)}" download="{name}">{text}</a>'
