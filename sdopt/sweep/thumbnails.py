"""A point's images, small and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdopt.sweep.result import Point, Result, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 4
"""Images of each point."""
SIDE = 96
"""Of the longer side of each, in pixels."""


def strip(result: Result, point: Point) -> Image | None:
    """The first images of a point side by side; those of other points show the same prompts."""
    from PIL import Image

    files = [result.work / one.path for one in _first_of_each(point.samples)]
    shown = []
    for file in [file for file in files if file.is_file()][:SHOWN]:
        with Image.open(file) as image:
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            shown.append(small)
    if not shown:
        return None
    strip = Image.new("RGB", (sum(one.width for one in shown), max(one.height for one in shown)))
    left = 0
    for one in shown:
        strip.paste(one, (left, 0))
        left += one.width
    return strip


def _first_of_each(samples: Sequence[Sample]) -> list[Sample]:
    """One image per prompt, in the prompts' order, and then the others."""
    order: dict[int, list[Sample]] = {}
    for one in sorted(samples, key=lambda one: (one.prompt, one.seed)):
        order.setdefault(one.prompt, []).append(one)
    firsts = [found[0] for found in order.values()]
    return [*firsts, *(one for found in order.values() for one in found[1:])]
