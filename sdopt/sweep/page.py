"""The page of a sweep: the frontier with its images, what each choice is worth, every point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import datafile
from sdopt.drawing.page import Cell, Page, data_url
from sdopt.sweep import charts
from sdopt.sweep.charts import Numbered
from sdopt.sweep.effects import MEASURES, RATIOS, Choice, Measure, effects
from sdopt.sweep.result import Point, Result
from sdopt.sweep.thumbnails import strip
from sdopt.units import size

if TYPE_CHECKING:
    from PIL.Image import Image

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

_EFFECTS = (
    "Against the first choice of its option: time and memory as a factor, the score as a "
    "difference, with standard errors. By least squares over all measured points, as if options "
    "did not depend on one another; - is what these points cannot tell apart."
)


def page(result: Result) -> Page:
    """The page of a sweep, its images included.

    Raises:
        MissingDependencyError: jinja2 or vl-convert-python is not installed, when it is written.
    """
    numbers = charts.numbered(result.points)
    strips = {point.key: found for point in result.points if (found := strip(result, point))}
    made = Page(f"Sweep of {result.origin or result.bundle}", *_lead(result))
    for shape in result.shapes:
        made.section(f"Frontier at {shape}" if len(result.shapes) > 1 else "Frontier")
        points = [point for point in result.points if point.shape == shape]
        _frontier(made, points, numbers, strips)
    _effects(made, effects([point for point in result.points if point.state == "done"]))
    _points(made, result.points, numbers)
    _commands(made, result, numbers)
    _measured(made, result)
    return made


def _lead(result: Result) -> list[str]:
    counts: dict[str, int] = {}
    for point in result.points:
        counts[point.state] = counts.get(point.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    settings = ", ".join(f"{k} {v}" for k, v in result.settings.items() if v not in (None, ""))
    lead = [f"{len(result.points)} points of {result.bundle}: {states}. Begun {result.date}."]
    lead += [settings] if settings else []
    return [*lead, f"Score: {result.scorer}." if result.scorer else "Nothing was scored."]


def _frontier(
    made: Page, points: Sequence[Point], numbers: Numbered, strips: Mapping[str, Image]
) -> None:
    images = {key: data_url(image) for key, image in strips.items()}
    chart = charts.frontier(points, numbers, images=images)
    best = sorted(
        (point for point in points if point.frontier),
        key=lambda point: (point.ms is None, point.ms or 0.0),
    )
    if chart is not None:
        made.chart(chart)
    if not best:
        made.text("No point of this size was measured.")
        return
    heads = ("#", "recipe", "target", "batch", "ms per image", "memory", "score")
    made.table(
        heads,
        [
            [
                numbers[one.key],
                one.name,
                one.target,
                one.batch,
                _milliseconds(one),
                _memory(one),
                _score(one),
            ]
            for one in best
        ],
        "The frontier, the fastest first: no other point of this size is at least as good on "
        "every axis and better on one.",
    )
    made.images(
        [(f"{numbers[one.key]}: {one.name}", strips[one.key]) for one in best if one.key in strips]
    )


def _effects(made: Page, choices: Sequence[Choice]) -> None:
    if not choices:
        return
    made.section("What each choice changes")
    chart = charts.effects(choices)
    if chart is not None:
        made.chart(chart)
    made.table(
        ("option", "choice", "points", "time", "memory", "score"),
        [
            [
                one.option,
                charts.label(one),
                one.points,
                *(_effect(one, measure) for measure in MEASURES),
            ]
            for one in choices
        ],
        _EFFECTS,
    )


def _effect(one: Choice, measure: Measure) -> str:
    factor = measure in RATIOS
    if one.value == one.base:
        return "1" if factor else "0"
    if (effect := one.effects.get(measure)) is None:
        return "-"
    error = effect.error if effect.error is None or not factor else effect.error * effect.value
    shown = f"{effect.value:.3f}" if factor else f"{effect.value:+.4f}"
    if error is None:
        return shown
    return f"{shown} ± {error:.3f}" if factor else f"{shown} ± {error:.4f}"


def _points(made: Page, points: Sequence[Point], numbers: Numbered) -> None:
    made.section("Points")
    made.table(
        (
            "#",
            "state",
            "recipe",
            "target",
            "size",
            "batch",
            "ms",
            "memory",
            "score",
            "prompts",
            "",
        ),
        [
            [
                numbers[one.key],
                _state(one),
                one.name,
                one.target,
                one.shape,
                one.batch,
                _milliseconds(one),
                _memory(one),
                _score(one),
                one.prompts,
                one.reason,
            ]
            for one in points
        ],
        "Milliseconds per image, median (least to most) of the rounds; memory of a process of its "
        "own; score, mean over prompts ± its standard error.",
    )


def _state(one: Point) -> Cell | str:
    if one.state == "failed":
        return Cell(one.state, "bad")
    return Cell("frontier", "good") if one.frontier else one.state


def _milliseconds(one: Point) -> str:
    if one.ms is None:
        return "-"
    spread = f" ({min(one.rounds):.4g} to {max(one.rounds):.4g})" if one.rounds else ""
    return f"{one.ms:.4g}{spread}"


def _memory(one: Point) -> str:
    return "-" if one.memory_bytes is None else size(one.memory_bytes)


def _score(one: Point) -> str:
    return "-" if one.score is None else charts.mean(one.score, one.score_error)


def _commands(made: Page, result: Result, numbers: Numbered) -> None:
    known = [point for point in result.points if point.command]
    made.section("Commands")
    if result.command:
        made.text("This sweep:")
        made.command(result.command)
    if known:
        made.table(
            ("#", "recipe", "command"),
            [[numbers[one.key], one.name, Cell(one.command, command=True)] for one in known],
            "What measures a point again.",
        )


def _measured(made: Page, result: Result) -> None:
    made.section("Where it was measured")
    rows: dict[tuple[str, ...], list[int]] = {}
    numbers = charts.numbered(result.points)
    for point in result.points:
        if point.here:
            rows.setdefault(_machine(point.here), []).append(numbers[point.key])
    made.table(
        ("processor", "cores", "memory", "cards", "versions", "points"),
        [[*machine, _ranges(points)] for machine, points in rows.items()],
        f"Run by: {result.engine}." if result.engine else "",
    )
    for note in result.notes:
        made.text(note)


def _machine(here: Mapping[str, Any]) -> tuple[str, ...]:
    memory = here.get("memory_bytes")
    versions = {"python": here.get("python", ""), **here.get("versions", {})}
    return (
        str(here.get("cpu", "")),
        str(here.get("cores", "")),
        size(memory) if memory else "-",
        ", ".join(here.get("cards", ())) or "none",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 2, 3, 7`` as ``1 to 3, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join(" to ".join(map(str, one)) for one in found)


def plot(result: Result, path: Path) -> list[Path]:
    """Write the frontier as a PNG, with the machine and the date; gives the files.

    Where there are several sizes each has a file, whose name ends in it.

    Raises:
        MissingDependencyError: vl-convert-python is not installed.
        StorageError: a file cannot be written.
    """
    numbers, made = charts.numbered(result.points), []
    for shape in result.shapes:
        points = [point for point in result.points if point.shape == shape]
        title = f"{result.origin or result.bundle} at {shape}"
        chart = charts.frontier(points, numbers, title, below=_below(result, points))
        if chart is not None:
            file = path if len(result.shapes) == 1 else path.with_stem(f"{path.stem}-{shape}")
            datafile.write_bytes(file, chart.png())
            made.append(file)
    return made


def _below(result: Result, points: Sequence[Point]) -> str:
    """The machines that points were measured on, onnxruntime's version, and the date."""
    machines = [
        ", ".join([str(one.here["cpu"]), f"{one.here['cores']} cores", *one.here["cards"]])
        for one in points
        if one.here
    ]
    versions = [one.here["versions"] for one in points if one.here]
    runtimes = [
        f"{name} {found[name]}" for found in versions for name in _RUNTIMES if name in found
    ]
    date = result.date.partition("T")[0]
    return "; ".join([*dict.fromkeys(machines), *dict.fromkeys(runtimes), date])
