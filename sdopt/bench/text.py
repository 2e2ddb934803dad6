"""A report for people: lines for a terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence

from sdopt.bench import charts
from sdopt.bench.report import BenchReport
from sdopt.bench.tables import ComponentBench, ImageBench, Memory, Table
from sdopt.drawing.page import Page

MEGA = 1e6

HEADS = ("row", "p50", "p95", "mean", "min", "max", "stdev", "IQR", "a second", "time / first")
HOW = (
    "Rows take turns within a round, each after a pause; ratios are of the same round, and shown "
    "is their median with the quartiles. A call is timed from arrays in host memory to arrays in "
    "host memory."
)


def lines(report: BenchReport) -> list[str]:
    """The report as lines, tables aligned."""
    found = [about(report)]
    for one in report.components:
        found += ["", f"{one.component}, ms per call: {_fed(one)}"]
        found += [f"  {_rounds(one)}", *_aligned(table(one))]
    if report.images is not None:
        found += ["", f"images, seconds each: {_drawn(report.images)}"]
        found += [f"  {_rounds(report.images)}", *_aligned(table(report.images))]
        found += _aligned(breakdown(report.images))
    if rows := memory(report):
        found += ["", "memory, MB, each row in a process of its own", *_aligned(rows)]
    return [*found, *([""] if report.notes else []), *(f"note: {one}" for one in report.notes)]


def page(report: BenchReport) -> Page:
    """The report as a page that needs nothing else."""
    made = Page(f"Benchmark of {report.origin or report.bundle}", about(report), HOW)
    for one in report.components:
        made.section(one.component)
        made.text(f"Milliseconds per call. {_fed(one)}. {_rounds(one)}.")
        _put(made, table(one))
        made.chart(charts.times(f"{one.component}: ms per call", one))
        made.chart(charts.drift(one.component, one))
    if (drawn := report.images) is not None:
        made.section("Images")
        made.text(f"Seconds per image. {_drawn(drawn)}. {_rounds(drawn)}.")
        _put(made, table(drawn))
        made.chart(charts.times("images: seconds each", drawn))
        _put(made, breakdown(drawn))
        made.chart(charts.parts(drawn))
        made.chart(charts.drift("images", drawn))
    if rows := memory(report):
        made.section("Memory")
        made.text("MB, each row in a process of its own.")
        _put(made, rows)
        for chart in charts.memory(report.rows):
            made.chart(chart)
    made.section("How it was measured")
    for note in report.notes:
        made.text(note, "bad" if note.startswith("noisy") else "")
    if report.command:
        made.code(report.command)
    _put(made, [("", ""), *facts(report)])
    stages = [
        f"{row.label}: {name} {digest}"
        for row in report.rows
        for name, digest in row.digests.items()
    ]
    made.details(f"digests of {len(stages)} stages", stages)
    made.details("options", [f"{name}: {value}" for name, value in report.settings.items()])
    return made


def about(report: BenchReport) -> str:
    """One line: what was measured, where, when."""
    here = report.machine
    rows = ", ".join(row.label for row in report.rows)
    return f"{report.bundle} ({rows}) on {here.cpu}, {here.usable_cores} cores, {report.date}"


def facts(report: BenchReport) -> list[tuple[str, str]]:
    """Name and value of what a reader must know to measure it again."""
    here = report.machine
    memory = f"{here.memory_bytes / 1e9:.1f} GB" if here.memory_bytes else "unknown"
    return [
        ("bundle", f"{report.bundle}, exported from {report.origin} ({report.family})"),
        ("date", report.date),
        ("processor", f"{here.cpu}, {here.usable_cores} of {here.cores} cores usable"),
        ("memory", memory),
        ("cards", ", ".join(here.cards) or "none that NVML tells of"),
        ("system", f"{here.os}, Python {here.python}"),
        ("load before", "unknown" if here.load is None else f"{here.load:.2f}"),
        ("environment", ", ".join(f"{k}={v}" for k, v in here.environment.items()) or "unset"),
        ("versions", ", ".join(f"{k} {v}" for k, v in here.versions.items())),
        ("targets", ", ".join(dict.fromkeys(row.target for row in report.rows))),
    ]


def table(one: Table) -> list[tuple[str, ...]]:
    """Heads, and a line of figures per row."""
    load = "load s" if not isinstance(one, ImageBench) else "load all s"
    found: list[tuple[str, ...]] = [(*HEADS, load)]
    for row in one.rows:
        spread, ratio = row.spread, one.ratio(row)
        times = (spread.p50, spread.p95, spread.mean, spread.min, spread.max)
        said = f"{ratio.p50:.3f} ({ratio.p25:.3f} to {ratio.p75:.3f})"
        found.append(
            (
                row.row,
                *(f"{value:.4g}" for value in times),
                "" if spread.stdev is None else f"{spread.stdev:.2g}",
                f"{spread.iqr:.2g}",
                f"{one.throughput(row):.4g}",
                "1" if row is one.rows[0] else said,
                f"{row.load_seconds:.2f}",
            )
        )
    return found


def breakdown(images: ImageBench) -> list[tuple[str, ...]]:
    """Heads, and per row the mean seconds inside each component and its calls per image."""
    names = dict.fromkeys(name for row in images.rows for name in images.breakdown(row))
    found: list[tuple[str, ...]] = [("mean s inside (x calls)", *names)]
    for row in images.rows:
        seconds, calls = images.breakdown(row), images.calls_per_image(row)
        found.append(
            (
                row.row,
                *(
                    f"{seconds.get(name, 0.0):.4g}"
                    + (f" (x{calls[name]:g})" if name in calls else "")
                    for name in names
                ),
            )
        )
    return found


def memory(report: BenchReport) -> list[tuple[str, ...]]:
    """Heads, and a line per row that was measured; nothing where none was."""
    measured = [(row.label, row.memory) for row in report.rows if row.memory is not None]
    if not measured:
        return []
    heads = ("row", "base", "graphs open", "peak", "peak of the card")
    return [heads, *((label, *_sizes(one)) for label, one in measured)]


def _sizes(one: Memory) -> tuple[str, ...]:
    host = (one.base_bytes, one.loaded_bytes, one.peak_bytes)
    card = one.device if one.device_bytes is None else f"{one.device_bytes / MEGA:.0f}"
    return (*("not measured" if n is None else f"{n / MEGA:.0f}" for n in host), card)


def _fed(one: ComponentBench) -> str:
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in one.shapes.items())
    return f"{shapes}; {one.feeds}"


def _drawn(images: ImageBench) -> str:
    return (
        f"{images.height}x{images.width} pixels, {images.steps} steps of {images.scheduler}, "
        f"guidance {images.guidance:g}, batch {images.batch}"
    )


def _rounds(one: Table) -> str:
    row = one.rows[0]
    said = f"{len(row.rounds)} rounds after {len(row.warm_up)} of warm-up"
    if isinstance(one, ComponentBench):
        said += f", each the mean of {one.calls_per_round} calls" * (one.calls_per_round > 1)
        said += ", an untimed call before each" * one.settled
    return said


def _put(made: Page, rows: Sequence[Sequence[str]]) -> None:
    made.table(rows[0], rows[1:])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
