"""What ``precision`` found, as text, JSON and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdopt.compare.figures import plain
from sdopt.drawing.charts import Chart, axis, points
from sdopt.drawing.page import Page
from sdopt.precision.bisection import Trial
from sdopt.precision.ranges import Limits, Range, by_module

_SHOWN = 6


@dataclass(frozen=True)
class PrecisionReport:
    """A keep-list, and the evidence for it.

    Attributes:
        bundle: its folder.
        component: its name.
        stage: the float32 stage that was looked at.
        dtype: ``fp16`` or ``bf16``.
        tolerance: the relative L2 from float32 that is allowed.
        inputs: what was fed: seeded or recorded, and how many samples.
        samples: of each sample, its name for people (``step 3, timestep 661, "a cat"``).
        limits: what the type holds.
        ranges: the values of every node that would compute in it, in graph order.
        everywhere: the error with nothing kept.
        keep: module paths or operators to keep; None if keeping all modules is not enough.
        error: what is left with them; of the cast graph itself, not of an estimate.
        without: of each entry, the error without it: none can be left out.
        nodes, kept: how many nodes the cast makes half, and how many of these are kept.
        trials: every keep-list that was tried.
        seconds: wall time.
        passes: the spec that makes the stage in half precision.
        recipe: the file that the spec was written to.
    """

    bundle: str
    component: str
    stage: str
    dtype: str
    tolerance: float
    inputs: str
    samples: tuple[str, ...]
    limits: Limits
    ranges: tuple[Range, ...]
    everywhere: float
    keep: tuple[str, ...] | None
    error: float
    without: Mapping[str, float]
    nodes: int
    kept: int
    trials: tuple[Trial, ...]
    seconds: float
    passes: str
    recipe: str = ""

    @property
    def passed(self) -> bool:
        """Whether a keep-list was found that is within the tolerance."""
        return self.keep is not None and self.error <= self.tolerance

    def overflowing(self) -> list[Range]:
        """Of each module whose values pass what the type holds, the largest, in graph order."""
        return [one for one in by_module(self.ranges).values() if one.overflows(self.limits)]

    def command(self) -> str:
        """The line that makes the stage."""
        source = self.recipe or f'"{self.passes}"'
        return (
            f"sdopt optimize {self.bundle} --component {self.component} "
            f"--passes {source} --stage {self.dtype}"
        )

    def lines(self) -> list[str]:
        """The report for people."""
        found = [
            f"{self.component}@{self.stage}, {self.inputs}",
            f"{self.dtype} everywhere: relative L2 {self.everywhere:.2e}, "
            f"allowed {self.tolerance:g}",
        ]
        over = self.overflowing()
        if over:
            found.append(f"{len(over)} module(s) pass {self.limits.largest:g} in float32:")
            found += [f"  {self._line(one)}" for one in over[:_SHOWN]]
        else:
            largest = max(self.ranges, key=lambda one: one.largest, default=None)
            if largest is not None:
                found.append(f"the largest value: {self._line(largest)}")
        if self.keep is None:
            found.append(
                f"no keep-list is enough: with every module in float32 it is {self.error:.2e}"
            )
            return found
        if not self.keep:
            found.append("nothing needs to stay in float32")
        for entry in self.keep:
            found.append(f"keep {entry}: without it {self.without[entry]:.2e}")
        found.append(
            f"with that: relative L2 {self.error:.2e}, {self.kept} of {self.nodes} nodes in "
            f"float32 ({len(self.trials)} trials, {self.seconds:.0f} s)"
        )
        if 2 * self.kept > self.nodes:
            found.append(
                f"most of it stays in float32: at this tolerance {self.dtype} gains little"
            )
        found.append(f"recipe: {self.passes}")
        found.append(self.command())
        return found

    def _line(self, one: Range) -> str:
        return f"{one.path} ({one.op}): up to {one.largest:.4g} in {self.samples[one.sample]}"

    def chart(self) -> Chart:
        """The largest magnitude of each node against its depth, and what the type holds."""
        rows = [
            {
                "depth": one.depth,
                "largest": one.largest,
                "module": one.path,
                "operator": one.op,
                "sample": self.samples[one.sample],
                "in range": "no" if one.overflows(self.limits) else "yes",
            }
            for one in self.ranges
            if 0 < one.largest < float("inf")
        ]
        chart = points(
            f"{self.component}: the largest magnitude by depth",
            rows,
            axis("depth", "node, in graph order"),
            axis("largest", "largest magnitude in float32", log=True),
            color=axis("in range", f"held by {self.dtype}", kind="nominal"),
            tooltip=("module", "operator", "largest", "sample"),
            texts=f"{self.dtype} holds magnitudes up to {self.limits.largest:g}. "
            + " ".join(self.lines()[1:]),
        )
        return chart

    def page(self) -> Page:
        """The chart, the keep-list with its evidence, the ranges, the trials."""
        made = Page(f"Precision of {self.component}", *self.lines()[:2])
        made.section("What to keep")
        made.text(self.lines()[-1], "" if self.passed else "bad")
        if self.keep:
            made.table(
                ("kept in float32", "error without it"),
                [(entry, f"{self.without[entry]:.2e}") for entry in self.keep],
            )
        made.code(self.passes)
        made.section("Ranges")
        made.chart(self.chart())
        made.table(
            ("depth", "module", "operator", "largest", "beyond", "subnormal", "lost", "sample"),
            [
                (
                    one.depth,
                    one.path,
                    one.op,
                    f"{one.largest:.4g}",
                    one.beyond,
                    f"{one.subnormal:.1%}",
                    f"{one.lost:.1%}",
                    self.samples[one.sample],
                )
                for one in by_module(self.ranges).values()
            ],
            "Of each module the node with the largest values.",
        )
        made.section("Trials")
        made.table(
            ("kept", "relative L2"),
            [(", ".join(one.keep) or "nothing", f"{one.error:.2e}") for one in self.trials],
        )
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; a figure that is no finite number is None."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        over = [one.path for one in self.overflowing()]
        return {**data, "overflowing": over, "passed": self.passed, "command": self.command()}
