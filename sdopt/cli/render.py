"""Reports as text on stderr and as JSON or a path on stdout; progress on a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.errors import InterruptedByUserError
from sdopt.units import size

if TYPE_CHECKING:
    from sdopt.report import ComponentReport, Coverage, PassReport, Progress, Report

_SKIPS_SHOWN = 4


def say(text: str) -> None:
    """A line for people: on stderr, so that stdout holds only the result."""
    print(text, file=sys.stderr)


def result(text: str) -> None:
    """The result: a path or JSON, on stdout, so that verbs pipe."""
    print(text)


def dump(data: Any) -> None:
    """Plain data as JSON on stdout."""
    result(json.dumps(data, indent=2))


def table(rows: Sequence[Sequence[str]]) -> None:
    """Rows for people, the first one of heads, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        say("  " + "  ".join(cells).rstrip())


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A bar that shows what is being done; silent when stderr is no terminal.

    Ctrl-C inside becomes an error that says what became of the work.
    """
    try:
        with _bar(label) as tell:
            yield tell
    except KeyboardInterrupt as interrupt:
        raise InterruptedByUserError(
            "interrupted", why="what was there before is unchanged", hint="run it again to go on"
        ) from interrupt


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.SpinnerColumn(),
        bars.BarColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda what, share: bar.update(task, description=f"{label} {what}", completed=share)


def report(one: Report, as_json: bool) -> None:
    """One verb's report: JSON on stdout, or a summary on stderr and the path on stdout."""
    if as_json:
        dump(one.to_json())
        return
    for note in one.notes:
        say(f"note: {note}")
    for component in one.components:
        _component(component)
    say(f"{one.verb}: {len(one.components)} component(s) in {one.seconds:.1f} s")
    for verdict in one.requirements:
        answer = "met" if verdict.met else "NOT met"
        counts = f"{verdict.done} of {verdict.found}" if verdict.found else "none was found"
        say(f"{verdict.requirement}: {answer} ({counts})")
    if one.met:
        result(one.bundle)


def _component(one: ComponentReport) -> None:
    if one.up_to_date:
        say(f"{one.component}: stage {one.stage} is up to date ({one.digest})")
    else:
        written = "" if one.digest else ", not written"
        if one.bytes_written:
            written = f", {size(one.bytes_written)} of weights written"
        say(f"{one.component}: stage {one.stage}, {one.nodes} nodes{written}, {one.seconds:.1f} s")
    for note in one.notes:
        say(f"  note: {note}")
    for each in one.passes:
        _pass(each)
    if one.artifact:
        _artifact(Path(one.file).parent.name, one.artifact)


def _artifact(folder: str, one: dict[str, Any]) -> None:
    """A line of what the compiler made, and what it said of the attentions."""
    facts = one["facts"]
    made = "is up to date" if one.get("up_to_date") else f"in {one['seconds']:.1f} s"
    say(f"  {folder}/{one['file']}: {size(one['size'])} {made}")
    if facts.get("attentions"):
        say(f"    {facts['attentions_fused']} of {facts['attentions']} attentions fused")


def _pass(one: PassReport) -> None:
    """A line of what was done, by kind and then what only tallies, and why the rest was not."""
    kinds = [f"{each.kind} {_figure(each)}" for each in one.coverage()]
    kinds += [f"{count} x {what}" for what, count in one.tallies().items()]
    what = "; ".join(kinds) or "nothing to do"
    nodes = f"{one.nodes_before} -> {one.nodes_after} nodes"
    say(f"  {one.spec}: {what} ({nodes}, {one.seconds:.2f} s)")
    for note in one.notes:
        say(f"    note: {note}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for skip in one.skips:
        reasons.setdefault((skip.kind, skip.reason), []).append(skip.where)
    for (kind, reason), places in list(reasons.items())[:_SKIPS_SHOWN]:
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        label = f"{kind} left" if kind else "left"
        say(f"    {label} {len(places)}: {reason} (at {places[0]}{more})")
    if len(reasons) > _SKIPS_SHOWN:
        say(f"    left for {len(reasons) - _SKIPS_SHOWN} other reasons: see --json")


def _figure(one: Coverage) -> str:
    """``32/32``, and how many of them were there before."""
    already = f" ({one.present} already)" if one.present else ""
    return f"{one.done}/{one.found}{already}"
