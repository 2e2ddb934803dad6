"""What a comparison layer by layer found: where the error begins, as text, chart and page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdopt.compare.figures import Figures, plain
from sdopt.drawing.charts import Chart, axis, line
from sdopt.drawing.page import Page

JUMP = 10.0
"""A layer's error jumps if it is so many times that of the layers that feed it."""
FLOOR = 1e-3
"""Relative L2 below which nothing is called a jump, where the passes allow no number."""
_SHOWN = 8


@dataclass(frozen=True)
class LayerError:
    """One layer of both sides; of several samples the worst.

    Attributes:
        name: its module path, or the value's name in graphs without module paths.
        depth: its number in graph order (that of ``a``, or of ``b`` if PyTorch runs ``a``).
        op: the operator that computes it there.
        figures: ``a`` against ``b``.
        fed: the largest relative L2 among the layers that it is computed from; 0 for the first.
    """

    name: str
    depth: int
    op: str
    figures: Figures
    fed: float

    @property
    def error(self) -> float:
        """Relative L2; infinite where only ``a`` holds NaN or infinity, NaN where ``b`` does."""
        if self.figures.finite:
            return self.figures.relative_l2
        bad_b = self.figures.nan_b or self.figures.inf_b
        return float("nan") if bad_b else float("inf")


@dataclass(frozen=True)
class LayerComparison:
    """The layers of one component on both sides.

    Attributes:
        component: its name.
        a, b: the sides; ``b`` is the reference.
        allowed: the relative L2 that the passes between them allow; None where only images tell.
        samples: of inputs that were run.
        layers: those on both sides with equal shapes, in graph order.
        reshaped: those on both sides whose shapes differ (merged tokens, another layout).
        only_a, only_b: how many layers one side alone has.
    """

    component: str
    a: str
    b: str
    allowed: float | None
    samples: int
    layers: tuple[LayerError, ...]
    reshaped: tuple[str, ...]
    only_a: int
    only_b: int

    @property
    def floor(self) -> float:
        """The error that a layer must pass to be called one that jumps."""
        return self.allowed if self.allowed else FLOOR

    @property
    def first_jump(self) -> LayerError | None:
        """The first layer that is far off, though what feeds it is not."""
        for one in self.layers:
            if one.error > self.floor and one.error > JUMP * one.fed:
                return one
        return None

    @property
    def first_beyond(self) -> LayerError | None:
        """The first layer that is farther off than what is allowed."""
        return next((one for one in self.layers if one.error > self.floor), None)

    def verdict(self) -> str:
        """Where the two part, in a sentence."""
        if not self.layers:
            return (
                "no layer of one has its like in the other, by module path or by name of a value; "
                "compare graphs of one exporter"
            )
        if (jump := self.first_jump) is not None:
            return f"the error jumps at {jump.name} ({jump.op}): {_of(jump)}"
        if (beyond := self.first_beyond) is not None:
            return f"no layer jumps; the error grows past {self.floor:g} at {beyond.name}"
        largest = max(self.layers, key=lambda one: (not math.isnan(one.error), one.error))
        return f"every layer within {self.floor:g}; the largest error is {_of(largest)}"

    def lines(self) -> list[str]:
        """The report for people: the verdict, and the layers that are farthest off."""
        found = [f"{self.component}: {len(self.layers)} layers on both sides; {self.verdict()}"]
        far = sorted(self.layers, key=lambda one: (math.isnan(one.error), -one.error))
        far = [one for one in far if one.error != 0][:_SHOWN]
        found += [f"  {one.depth:>4} {one.name} ({one.op}): {_of(one)}" for one in far]
        if self.reshaped:
            more = f" and {len(self.reshaped) - 1} more" if len(self.reshaped) > 1 else ""
            found.append(f"  of another shape on each side: {self.reshaped[0]}{more}")
        found.append(f"  only in a: {self.only_a}, only in b: {self.only_b}")
        return found

    def chart(self) -> Chart:
        """Relative L2 of each layer against its depth."""
        rows = [
            {
                "depth": one.depth,
                "relative L2": one.error,
                "layer": one.name,
                "operator": one.op,
                "max abs": one.figures.max_abs,
            }
            for one in self.layers
        ]
        equal = sum(1 for one in self.layers if one.error == 0)
        bad = [one.name for one in self.layers if not one.figures.finite]
        texts = f"{self.a} against {self.b}: {self.verdict()}."
        texts += f" Not drawn: {equal} layers that are equal." if equal else ""
        texts += f" Not drawn: {len(bad)} that hold NaN or infinity, from {bad[0]}." if bad else ""
        return line(
            f"{self.component}: error by depth",
            rows,
            axis("depth", "layer, in graph order"),
            axis("relative L2", "relative L2", log=True),
            tooltip=("layer", "operator", "relative L2", "max abs", "depth"),
            rules=[("allowed", self.floor)] if self.allowed else [],
            texts=texts,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; a figure that is no finite number is None."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        jump = self.first_jump
        return {**data, "first_jump": jump.name if jump else None, "verdict": self.verdict()}


def page(comparisons: Sequence[LayerComparison]) -> Page:
    """A page with the chart of each component, and the figures of every layer below it."""
    made = Page("Error by layer", *(f"{one.component}: {one.verdict()}" for one in comparisons))
    for one in comparisons:
        made.section(one.component)
        made.text(f"a: {one.a}; b, the reference: {one.b}; {one.samples} sample(s) of inputs")
        made.chart(one.chart())
        made.table(
            ("depth", "layer", "operator", "relative L2", "fed", "max abs", "NaN", "infinite"),
            [
                (
                    layer.depth,
                    layer.name,
                    layer.op,
                    f"{layer.error:.2e}",
                    f"{layer.fed:.2e}",
                    f"{layer.figures.max_abs:.2e}",
                    layer.figures.nan_a,
                    layer.figures.inf_a,
                )
                for layer in one.layers
            ],
        )
    return made


def _of(one: LayerError) -> str:
    if not one.figures.finite:
        return (
            f"{one.figures.nan_a} NaN and {one.figures.inf_a} infinities in a, "
            f"{one.figures.nan_b} and {one.figures.inf_b} in b, of {one.figures.shape}"
        )
    return f"relative L2 {one.error:.2e}, fed {one.fed:.2e}"
