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
        "height": {"step": 22},
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
    encoding: dict[str, Any] = {
        "x": {"scale": {"zero": False}, **x},
        "y": {"scale": {"zero": False}, **y},
        "tooltip": _tooltip(tooltip),
    }
    if color is not None:
        encoding["color"] = color
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "point", "filled": True, "size": 80}, "encoding": encoding}
    ]
    if label is not None:
        mark = {"type": "text", "align": "left", "dx": 8}
        layers.append({"mark": mark, "encoding": {**encoding, "text": {"field": label}}})
    return Chart(title, {"data": {"values": list(rows)}, "layer": layers}, texts)


def _tooltip(fields: Sequence[str]) -> list[Row]:
    return [{"field": name, "title": name} for name in fields]


def _drawable(value: Any, log: bool) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and not (log and value <= 0)
