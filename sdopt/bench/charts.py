"""The charts of a report: times with their p95, rounds in order, parts of an image, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdopt.bench.tables import HOST, ComponentBench, ImageBench, Row, Table
from sdopt.drawing.charts import Chart, axis, bars, line

MEGA = 1e6

_ROW = axis("row", "", kind="nominal")


def of(
    rows: Sequence[Row], components: Sequence[ComponentBench], images: ImageBench | None
) -> list[Chart]:
    """All charts, component by component, then whole images, then memory."""
    found = []
    for one in components:
        found += [times(f"{one.component}: ms per call", one), drift(one.component, one)]
    if images is not None:
        found += [times("images: seconds each", images), parts(images), drift("images", images)]
    return found + memory(rows)


def times(title: str, table: Table) -> Chart:
    """A bar up to each row's p50, and a line from there to its p95."""
    data = [
        {
            "row": row.row,
            "p50": row.spread.p50,
            "p95": row.spread.p95,
            "min": row.spread.min,
            "max": row.spread.max,
            "ratio": table.ratio(row).p50,
        }
        for row in table.rows
    ]
    tooltip = [{"field": name, "title": name, "format": ".4~g"} for name in list(data[0])[1:]]
    tooltip.insert(0, {"field": "row", "title": "row"})
    common: dict[str, Any] = {"y": _ROW, "tooltip": tooltip}
    at_p95 = axis("p95", "")
    p50 = axis("p50", f"{table.unit}: p50 (bar) to p95 (line)")
    layers = [
        {
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {**common, "x": p50, "color": {**_ROW, "legend": None}},
        },
        {"mark": "rule", "encoding": {**common, "x": p50, "x2": {"field": "p95"}}},
        {"mark": {"type": "tick", "thickness": 2}, "encoding": {**common, "x": at_p95}},
    ]
    said = "; ".join(
        f"{one['row']} {one['p50']:.4g} to {one['p95']:.4g} {table.unit}" for one in data
    )
    spec = {"data": {"values": data}, "layer": layers, "height": {"step": 26}}
    return Chart(title, spec, f"p50 to p95: {said}.")


def drift(name: str, table: Table) -> Chart:
    """Every round in the order it was taken: what slows all rows alike is the machine."""
    data = [
        {"round": index + 1, "row": row.row, "time": value}
        for row in table.rows
        for index, value in enumerate(row.rounds)
    ]
    return line(
        f"{name}: {table.unit}, round by round",
        data,
        {**axis("round", "round"), "axis": {"tickMinStep": 1, "format": "d"}},
        axis("time", table.unit),
        color=_ROW,
        tooltip=["row", "round", "time"],
        texts="Rows take turns within a round: what moves all lines is the machine.",
    )


def parts(images: ImageBench) -> Chart:
    """What an image is made of, by row."""
    data = [
        {"row": row.row, "part": name, "seconds": seconds, "order": order}
        for row in images.rows
        for order, (name, seconds) in enumerate(images.breakdown(row).items())
    ]
    return _in_order(
        "images: where the time goes",
        data,
        _ROW,
        axis("seconds", "mean seconds per image"),
        color=axis("part", "inside", kind="nominal"),
        tooltip=["row", "part", "seconds"],
        texts=f"{HOST} is what is spent outside the components: scheduler, tokenizer, copies.",
    )


def memory(rows: Sequence[Row]) -> list[Chart]:
    """Host memory by what it is for, and the card's where that was measured."""
    host, card = [], []
    for row in rows:
        one = row.memory
        if one is None:
            continue
        if one.base_bytes is not None and one.loaded_bytes and one.peak_bytes:
            steps = (
                ("Python and libraries", one.base_bytes),
                ("graphs open", one.loaded_bytes - one.base_bytes),
                ("while computing", one.peak_bytes - one.loaded_bytes),
            )
            host += [
                {"row": row.label, "for": name, "MB": size / MEGA, "order": order}
                for order, (name, size) in enumerate(steps)
            ]
        if one.device_bytes is not None:
            card.append({"row": row.label, "MB": one.device_bytes / MEGA})
    found = []
    if host:
        found.append(
            _in_order(
                "host memory at its peak, MB",
                host,
                _ROW,
                axis("MB", "MB"),
                color=axis("for", "for", kind="nominal"),
                tooltip=["row", "for", "MB"],
                texts="Of a process of its own per row.",
            )
        )
    if card:
        title = "the card's memory at its peak, MB"
        found.append(bars(title, card, _ROW, axis("MB", "MB"), tooltip=["row", "MB"]))
    return found


def _in_order(title: str, data: Sequence[dict[str, Any]], *axes: Any, **options: Any) -> Chart:
    """Stacked bars whose parts lie as their ``order`` says, not by the alphabet."""
    made = bars(title, data, *axes, stacked=True, **options)
    order = {"field": "order", "type": "quantitative"}
    encoding = {**made.spec["encoding"], "order": order}
    return Chart(title, {**made.spec, "encoding": encoding}, made.texts)
