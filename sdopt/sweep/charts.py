"""The charts of a sweep: the frontier, and what each choice is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdopt.drawing.charts import Chart
from sdopt.sweep.effects import MEASURES, RATIOS, WITHOUT, Choice, Measure
from sdopt.sweep.result import Point

FRONTIER, OTHER, STOPPED = "on the frontier", "worse than another", "stopped early"
_COLOURS = {FRONTIER: "#0969da", OTHER: "#8c959f", STOPPED: "#d4a72c"}
_WIDTH, _HEIGHT = 420, 300
_MB = 1e6

_FIELDS: Mapping[Measure, tuple[str, str]] = {
    "ms": ("ms", "milliseconds per image"),
    "memory_bytes": ("MB", "memory, MB"),
    "score": ("score", "score"),
}
"""Of each measure its field in a row and its title."""

Numbered = Mapping[str, int]
"""A number for each point, by its key."""


def numbered(points: Sequence[Point]) -> Numbered:
    """The number that a point has in charts and tables, from 1, in the order they were tried."""
    return {point.key: number for number, point in enumerate(points, start=1)}


def frontier(
    points: Sequence[Point],
    numbers: Numbered,
    title: str = "Time, memory and score",
    *,
    images: Mapping[str, str] | None = None,
    below: str = "",
) -> Chart | None:
    """The points of one size, those on the frontier with their number; None with nothing to draw.

    Each panel has a line along the points that are best by its own two axes.

    Args:
        points: of one size.
        numbers: see ``numbered``.
        title: of the chart.
        images: data URLs by the points' keys, shown when the pointer is on one.
        below: a line under the title, as where and when it was measured.
    """
    rows = [_row(point, numbers, images or {}) for point in points]
    panels = [
        _panel(rows, x, y)
        for x, y in _panels(points)
        if any(_both(row, _FIELDS[x][0], _FIELDS[y][0]) for row in rows)
    ]
    if not panels:
        return None
    spec: dict[str, Any] = {"data": {"values": rows}, "hconcat": panels}
    spec["title"] = {"text": title, "subtitle": below, "anchor": "start"}
    on = sorted(row["#"] for row in rows if row["state"] == FRONTIER)
    texts = (
        f"On the frontier: {', '.join(map(str, on))} of {len(rows)} points. Up and to the left is "
        "better; the line joins what is best by the two axes of its panel alone."
    )
    return Chart(title, spec, texts)


def effects(choices: Sequence[Choice]) -> Chart | None:
    """What each choice changes, a panel per measure; None if nothing was varied."""
    panels = [found for one in MEASURES if (found := _bars(choices, one)) is not None]
    if not panels:
        return None
    return Chart("What each choice changes", {"hconcat": panels})


def _panels(points: Sequence[Point]) -> Iterator[tuple[Measure, Measure]]:
    if any(point.score is not None for point in points):
        yield "ms", "score"
        yield "memory_bytes", "score"
    else:
        yield "ms", "memory_bytes"


def _row(point: Point, numbers: Numbered, images: Mapping[str, str]) -> dict[str, Any]:
    state = FRONTIER if point.frontier else STOPPED if point.state == "stopped" else OTHER
    row: dict[str, Any] = {
        "#": numbers[point.key],
        "recipe": point.name,
        "target": point.target,
        "batch": point.batch,
        "ms": _rounded(point.ms),
        "MB": None if point.memory_bytes is None else _rounded(point.memory_bytes / _MB),
        "score": point.score,
        "shown": "" if point.score is None else mean(point.score, point.score_error),
        "prompts": point.prompts,
        "state": state,
    }
    if point.key in images:
        row["image"] = images[point.key]
    return row


def mean(value: float, error: float | None) -> str:
    """A score with its standard error."""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _both(row: Mapping[str, Any], x: str, y: str) -> bool:
    return row[x] is not None and row[y] is not None


def _panel(rows: Sequence[Mapping[str, Any]], x: Measure, y: Measure) -> dict[str, Any]:
    (across, title), (up, up_title) = _FIELDS[x], _FIELDS[y]
    at = {
        "x": {"field": across, "type": "quantitative", "title": title, "scale": {"zero": False}},
        "y": {"field": up, "type": "quantitative", "title": up_title, "scale": {"zero": False}},
    }
    colour = {
        "field": "state",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(_COLOURS), "range": list(_COLOURS.values())},
        "legend": {"orient": "bottom"},
    }
    told = ["#", "recipe", "target", "batch", "ms", "MB", "prompts"]
    tooltip = [{"field": name, "title": name} for name in told]
    tooltip.insert(6, {"field": "shown", "title": "score"})
    if any("image" in row for row in rows):
        tooltip.append({"field": "image", "title": "image"})
    known = {"filter": f"isValid(datum['{across}']) && isValid(datum['{up}'])"}
    best = {
        "type": "line",
        "interpolate": "step-after",
        "color": _COLOURS[FRONTIER],
        "opacity": 0.4,
    }
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "transform": [known],
        "layer": [
            {
                "data": {"values": _staircase(rows, across, up, lower=y != "score")},
                "mark": best,
                "encoding": at,
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0.9},
                "encoding": {**at, "color": colour, "tooltip": tooltip},
            },
            {
                "transform": [{"filter": f"datum.state === '{FRONTIER}'"}],
                "mark": {"type": "text", "align": "left", "dx": 7, "dy": -7, "fontSize": 11},
                "encoding": {**at, "text": {"field": "#"}},
            },
        ],
    }


def _staircase(
    rows: Sequence[Mapping[str, Any]], x: str, y: str, *, lower: bool
) -> list[dict[str, float]]:
    """The points that are best by two axes, from left to right."""
    sign = -1 if lower else 1
    whole = [row for row in rows if _both(row, x, y) and row["state"] != STOPPED]
    found: list[dict[str, float]] = []
    for row in sorted(whole, key=lambda one: (one[x], -sign * one[y])):
        if not found or sign * row[y] > sign * found[-1][y]:
            found.append({x: row[x], y: row[y]})
    return found


def _bars(choices: Sequence[Choice], measure: Measure) -> dict[str, Any] | None:
    rows = [
        {"option": one.option, "choice": label(one), **_bar(one, measure)}
        for one in choices
        if measure in one.effects
    ]
    if not rows:
        return None
    title = f"{_FIELDS[measure][0]}, % more" if measure in RATIOS else "score, more"
    choice = {"field": "choice", "type": "nominal", "title": None, "sort": None}
    tooltip = [{"field": name} for name in ("option", "choice", "against", "value", "error")]
    return {
        "width": 220,
        "height": {"step": 20},
        "data": {"values": rows},
        "layer": [
            {
                "mark": {"type": "bar"},
                "encoding": {
                    "y": choice,
                    "x": {"field": "value", "type": "quantitative", "title": title},
                    "color": {"field": "option", "type": "nominal", "sort": None, "legend": None},
                    "tooltip": tooltip,
                },
            },
            {
                "mark": {"type": "rule"},
                "encoding": {
                    "y": choice,
                    "x": {"field": "low", "type": "quantitative"},
                    "x2": {"field": "high"},
                },
            },
        ],
    }


def _bar(one: Choice, measure: Measure) -> dict[str, Any]:
    effect = one.effects[measure]
    factor = measure in RATIOS
    value = 100 * (effect.value - 1) if factor else effect.value
    error = (effect.error or 0.0) * (100 * effect.value if factor else 1.0)
    return {
        "value": _rounded(value),
        "error": None if effect.error is None else _rounded(error),
        "low": value - error,
        "high": value + error,
        "against": one.base or f"no {one.option}",
    }


def label(one: Choice) -> str:
    """A choice for people: ``tome=3``, ``no tome``, ``batch 4``."""
    if one.value == WITHOUT:
        return f"no {one.option}"
    return one.value if one.value.startswith(one.option) else f"{one.option}: {one.value}"
