"""Results of sweeps that nobody ran, for pages and charts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from PIL import Image

from sdopt.sweep.result import Point, Result, Sample

HERE = {
    "cpu": "A Processor",
    "cores": 2,
    "memory_bytes": 8_000_000_000,
    "cards": [],
    "python": "3.11.7",
    "versions": {"onnxruntime": "1.31.1"},
}
EVIL = "</script><b>&"


def point(tome: int, half: bool, number: int, **other: Any) -> Point:
    """A point of a grid in which ``tome=N`` takes tenths off the time and a cast doubles it."""
    merged = f"tome={tome}" if tome else ""
    cast = "cast_fp16" if half else ""
    fields = {
        "ms": 100.0 * 0.9**tome * (2.0 if half else 1.0),
        "memory_bytes": int(2e8 * (0.5 if half else 1.0)),
        "score": round(0.95 - 0.01 * tome - (0.002 if half else 0.0), 4),
        "score_error": 0.004,
        "state": "done",
        **other,
    }
    return Point(
        key=f"k{number}",
        recipe=",".join(filter(None, ("@fast", merged, cast))),
        target="ort",
        shape="128x128",
        batch=1,
        choices={"tome": merged, "cast_fp16": cast},
        prompts=4,
        here=HERE,
        command=f"sdopt sweep bundle --passes '@fast,{merged}' # {number}",
        **fields,
    )


def result(folder: Path) -> Result:
    """A grid of three by two with two images each, a stopped point and a failed one."""
    grid = itertools.product((0, 1, 2), (False, True))
    points = []
    for number, (tome, half) in enumerate(grid):
        samples = tuple(
            Sample(index, f"a digit {EVIL}", index, f"{number}-{index}.png", 0.9)
            for index in range(2)
        )
        for index, one in enumerate(samples):
            Image.new("RGB", (128, 64), (40 * number, 200 * index, 0)).save(folder / one.path)
        points.append(point(tome, half, number, samples=samples, frontier=not half))
    points.append(point(4, True, 6, state="stopped", reason="worse than k1", score=0.5))
    nothing = {"ms": None, "memory_bytes": None, "score": None, "score_error": None}
    points.append(point(5, True, 7, state="failed", reason=f"cannot be lowered {EVIL}", **nothing))
    return Result(
        folder=folder,
        work=folder,
        bundle="bundle",
        origin=f"examples/digits {EVIL}",
        settings={"steps": 10},
        axes=("ms", "memory_bytes", "score"),
        scorer="scorer.py:sure",
        engine="2 processes",
        command="sdopt sweep bundle --passes '@fast,tome=0..2,|cast_fp16'",
        date="2026-11-25T20:00:00+00:00",
        points=tuple(points),
        notes=("A note.",),
    )
