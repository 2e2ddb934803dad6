"""Charts as Vega-Lite specifications, which say what is drawn and leave the drawing to Vega."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdopt.errors import MissingDependencyError

VEGA_LITE = "6.4"
"""The release of Vega-Lite that draws; vl-convert carries several."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
WIDTH, HEIGHT = 640, 280
"""Of a chart, in pixels."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart: its title, and its Vega-Lite specification (https://vega.github.io/vega-lite).

    The data are in the specification, so it needs nothing else. ``texts`` says in words what a
    reader who sees no picture should know.
    """

    title: str
    spec: Mapping[str, Any]
    texts: str = ""

    def full_spec(self) -> dict[str, Any]:
        """The specification with what every chart has in common."""
        config = {"view": {"stroke": None}, "font": "sans-serif", "axis": {"grid": True}}
        common = {"$schema": SCHEMA, "background": "white", "config": config}
        return {**common, "width": WIDTH, "height": HEIGHT, "title": self.title, **self.spec}

    def png(self, scale: float = 2.0) -> bytes:
        """The chart as a PNG file's bytes, ``scale`` pixels of it for one of the page.

        Raises:
            MissingDependencyError: vl-convert-python is not installed.
        """
        drawn: bytes = renderer().vegalite_to_png(
            self.full_spec(), vl_version=VEGA_LITE, scale=scale
        )
        return drawn


def renderer() -> Any:
    """The module that draws without a browser and without the network.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingDependencyError(
            "plots and pages need vl-convert-python",
            why=str(error),
            hint='pip install "sdopt[report]"',
        ) from error
    return vl_convert


def axis(field: str, title: str, *, log: bool = False, kind: str = "quantitative") -> Row:
    """An encoding of a field: ``kind`` is quantitative, nominal or ordinal."""
    found: dict[str, Any] = {"field": field, "type": kind, "title": title}
    if log:
        found["scale"] = {"type": "log"}
        found["axis"] = {"format": "~e", "tickCount": 8}
    if kind in ("nominal", "ordinal"):
        found["sort"] = None  # as the rows come, not by the alphabet
    return found


def line(
    title: str,
    rows: Sequence[Row],
    x: Row,
    y: Row,
    *,
    color: Row | None = None,
    tooltip: Sequence[str] = (),
    rules: Sequence[tuple[str, float]] = (),
    texts: str = "",
) -> Chart:
    """Points joined by lines, one line per ``color``; ``rules`` are labelled horizontal lines.

    Fields named in ``tooltip`` are shown on hover. On a logarithmic axis zeros and what is no
    finite number cannot be drawn and are left out, so say in ``texts`` how many those are.
    """
    log = "scale" in y
    shown = [row for row in rows if _drawable(row.get(y["field"]), log)]
    encoding: dict[str, Any] = {"x": x, "y": y, "tooltip": _tooltip(tooltip)}
    if color is not None:
        encoding["color"] = color
    layers: list[dict[str, Any]] = [
        {"data": {"values": shown}, "mark": {"type": "line", "point": True}, "encoding": encoding}
    ]
    for name, value in rules:
        at = {"data": {"values": [{"name": name, "at": value}]}}
        where = {"y": {"field": "at", "type": "quantitative"}}
        layers += [
            {**at, "mark": {"type": "rule", "strokeDash": [4, 4]}, "encoding": where},
            {
                **at,
                "mark": {"type": "text", "align": "left", "dx": 4, "dy": -6, "x": 0},
                "encoding": {**where, "text": {"field": "name"}},
            },
        ]
    return Chart(title, {"layer": layers}, texts)


def bars(
    title: str,
    rows: Sequence[Row],
    category: Row,
    value: Row,
    *,
    color: Row | None = None,
    stacked: bool = False,
    tooltip: Sequence[str] = (),
    texts: str = "",
) -> Chart:
    """Horizontal bars, a group of them per category where ``color`` tells several apart."""
    encoding: dict[str, Any] = {"y": category, "x": value, "tooltip": _tooltip(tooltip)}
    if color is not None:
        encoding["color"] = color
        if not stacked:
            encoding["yOffset"] = {"field": color["field"], "sort": None}
    spec = {
        "data": {"values": list(rows)},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": encoding,
        "height": {"step": 22 if stacked or color is None else 12},
    }
    return Chart(title, spec, texts)


def points(
    title: str,
    rows: Sequence[Row],
    x: Row,
    y: Row,
    *,
    color: Row | None = None,
    label: str | None = None,
    tooltip: Sequence[str] = (),
    texts: str = "",
) -> Chart:
    """Points, each with the text of its field ``label`` beside it.

    A field of the tooltip that is called ``image`` and holds a data URL is shown as a picture.
    """
    encoding: dict[str, Any] = {"x": _tight(x), "y": _tight(y), "tooltip": _tooltip(tooltip)}
    if color is not None:
        encoding["color"] = color
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "point", "filled": True, "size": 80}, "encoding": encoding}
    ]
    if label is not None:
        mark = {"type": "text", "align": "left", "dx": 8}
        layers.append({"mark": mark, "encoding": {**encoding, "text": {"field": label}}})
    return Chart(title, {"data": {"values": list(rows)}, "layer": layers}, texts)


def _tight(encoding: Row) -> Row:
    """An axis that need not show zero, where it is one that would."""
    if encoding["type"] != "quantitative" or "scale" in encoding:
        return encoding
    return {**encoding, "scale": {"zero": False}}


_LANE, _LEVEL = 46, 170
"""Pixels between two lanes of a tree and between two of its levels."""


def tree(
    title: str,
    rows: Sequence[Row],
    *,
    color: Row | None = None,
    tooltip: Sequence[str] = (),
    texts: str = "",
) -> Chart:
    """What came from what, from left to right.

    Each row has an ``id``, the id of its ``parent`` (empty, or none of the rows', for a root), a
    ``label``, and a ``below`` that stands under the label in small.
    """
    placed = _placed(rows)
    at = {row["id"]: row for row in placed}
    joints = [joint for row in placed if row.get("parent") in at for joint in _joints(row, at)]
    levels = 1 + max((row["x"] for row in placed), default=0)
    lanes = 1 + max((row["y"] for row in placed), default=0)

    def place(name: str, top: float) -> Row:
        low = -0.6 if name == "y" else -0.05
        scale = {"domain": [low, top], "nice": False, "zero": False, "reverse": name == "y"}
        return {"field": name, "type": "quantitative", "axis": None, "scale": scale}

    where = {"x": place("x", levels), "y": place("y", lanes - 0.4)}
    encoding: dict[str, Any] = {**where, "tooltip": _tooltip(tooltip)}
    if color is not None:
        encoding["color"] = color
    left = {"type": "text", "align": "left"}
    spec = {
        "data": {"values": placed},
        "width": levels * _LEVEL,
        "height": lanes * _LANE,
        "layer": [
            {
                "data": {"values": joints},
                "mark": {"type": "rule", "color": "#8c959f"},
                "encoding": {**where, "x2": {"field": "x2"}, "y2": {"field": "y2"}},
            },
            {"mark": {"type": "point", "filled": True, "size": 90}, "encoding": encoding},
            {
                "mark": {**left, "dx": 8, "dy": -9, "fontWeight": "bold"},
                "encoding": {**where, "text": {"field": "label"}},
            },
            {
                "mark": {**left, "dx": 8, "dy": 10, "fontSize": 10, "color": "#57606a"},
                "encoding": {**where, "text": {"field": "below"}},
            },
        ],
    }
    return Chart(title, spec, texts)


def _joints(row: Row, at: Mapping[str, Row]) -> list[Row]:
    """From a row's parent to its own lane, and along that: no line crosses a label."""
    parent = at[row["parent"]]
    corner = {"x": parent["x"], "y": row["y"]}
    return [
        {"x": parent["x"], "y": parent["y"], "x2": corner["x"], "y2": corner["y"]},
        {**corner, "x2": row["x"], "y2": row["y"]},
    ]


def _placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a tree with ``x``, their level, and ``y``, their lane: first children go on."""
    known = {row["id"] for row in rows}
    children: dict[str, list[Row]] = {}
    for row in rows:
        parent = row.get("parent", "")
        children.setdefault(parent if parent in known else "", []).append(row)
    placed: dict[str, dict[str, Any]] = {}
    lanes = 0

    def walk(row: Row, level: int) -> None:
        nonlocal lanes
        placed[row["id"]] = {**row, "x": level, "y": lanes}
        below = [one for one in children.get(row["id"], ()) if one["id"] not in placed]
        for index, child in enumerate(below):
            lanes += bool(index)
            walk(child, level + 1)

    # Rows that came from each other in a circle have no root: the first of them serves.
    for root in (*children.get("", ()), *rows):
        if root["id"] not in placed:
            lanes += bool(placed)
            walk(root, 0)
    return list(placed.values())


def _tooltip(fields: Sequence[str]) -> list[Row]:
    return [{"field": name, "title": name} for name in fields]


def _drawable(value: Any, log: bool) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and not (log and value <= 0)
