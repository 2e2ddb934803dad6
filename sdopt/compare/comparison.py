"""The comparison of two sides and its verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdopt.compare.figures import Figures, figures, figures_of_any, plain, worst
from sdopt.compare.hooks import Hooks
from sdopt.compare.pairing import (
    SAMPLES,
    Asked,
    Feeds,
    opened_pairs,
    passes_between,
    tolerance_of,
)
from sdopt.compare.sides import Opened
from sdopt.errors import UsageError
from sdopt.report import Progress
from sdopt.tolerance import Tolerance

_HIDDEN = (
    "onnxruntime's CPU computes float16 in float32 from one cast to the next, so an overflow "
    "inside may not show here; --layers and sdopt precision see it"
)

Verdict = Literal["same", "different", "unjudged"]


@dataclass(frozen=True)
class ComponentComparison:
    """One component of both sides, on one set of inputs or on several.

    ``passes`` are those that only one side went through; ``allowed`` is the relative L2 that they
    allow, None where only images can tell; ``shapes`` are those of the (first) inputs. Of several
    samples ``outputs`` holds the worst, and ``errors`` the relative L2 of each output in each.
    ``note`` says what the verdict does not cover.
    """

    component: str
    a: str
    b: str
    verdict: Verdict
    allowed: float | None
    reason: str
    passes: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: tuple[Figures, ...]
    samples: int = 1
    errors: tuple[tuple[float, ...], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    ``skipped`` are components that only one side has, ``unfed`` those that nothing was recorded
    of.
    """

    a: str
    b: str
    seed: int
    components: tuple[ComponentComparison, ...]
    skipped: tuple[str, ...] = ()
    unfed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the passes between allow."""
        return all(one.verdict != "different" for one in self.components)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; a figure that is no finite number is None."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        return {**data, "passed": self.passed}

    def lines(self) -> list[str]:
        """The report for people, a line per component and per output."""
        found = [f"a: {self.a}", f"b: {self.b} (the reference)"]
        for one in self.components:
            allowed = "" if one.allowed is None else f", up to {one.allowed:g}"
            samples = "" if one.samples == 1 else f", the worst of {one.samples} samples"
            found.append(f"{one.component}: {one.verdict} ({one.reason}{allowed}{samples})")
            found += [f"  {_line(output)}" for output in one.outputs]
            found += [f"  note: {one.note}"] if one.note else []
        found += [f"{name}: only one side has it" for name in self.skipped]
        found += [f"{name}: nothing was recorded of it" for name in self.unfed]
        return found


def compare(
    a: str | Path,
    b: str | Path,
    *,
    components: Sequence[str] | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    target: str = "ort",
    hooks: str | None = None,
    recorded: str | Path | None = None,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Comparison:
    """Run the same seeded inputs through two things and judge how far they are apart.

    Args:
        a: ``BUNDLE`` (its optimized stage, else the raw one), ``BUNDLE@STAGE``, an ONNX file, or a
            diffusers folder (``FOLDER@pytorch`` where it is a bundle too), which PyTorch runs in
            float32. What exists as a path is that path, whatever it holds an ``@`` for.
        b: likewise; the reference of the relative figures.
        components: which ones; all that both have by default.
        seed: of the inputs.
        sizes: of dynamic dimensions by name (``{"height": 32}``).
        target: what runs the graphs, with its own optimisations off.
        hooks: a Python file or module with ``preprocess``, which makes what both sides are fed of
            the seeded inputs, or ``postprocess``, whose results are judged like outputs.
        recorded: a folder that ``record`` wrote: its samples in place of seeded inputs.
        samples: of these at most so many, evenly chosen; the worst decides.
        progress: is told the component.

    Raises:
        UsageError: a pair that cannot be compared (other inputs, other outputs, no graph).
        UnknownNameError: a component or stage that is not there.
        BundleError: no recording there.
    """
    asked = Asked.of(seed, sizes, hooks, recorded, samples)
    pairs, skipped = opened_pairs(a, b, target, components, progress)
    found, unfed = [], []
    for name, left, right, tell in pairs:
        if components or (asked.has(left) and asked.has(right)):
            one = _compare(name, left, right, asked, tell)
            hidden = one.verdict != "different" and "cuda" not in target and _hides(left, right)
            found.append(dataclasses.replace(one, note=_HIDDEN) if hidden else one)
        else:
            unfed.append(name)
    return Comparison(str(a), str(b), seed, tuple(found), skipped, tuple(unfed))


def _hides(a: Opened, b: Opened) -> bool:
    """Whether a graph in float16 is run by onnxruntime's CPU."""
    return any(one.inside is not None and "float16" in one.dtypes for one in (a, b))


def _compare(
    name: str, a: Opened, b: Opened, asked: Asked, progress: Progress
) -> ComponentComparison:
    fed = asked.feeds(a, b)
    shapes = {key: feed.shape for key, feed in fed[0].items()}
    every: list[tuple[Figures, ...]] = []
    for index, feeds in enumerate(fed):
        if index:
            progress(f"{name}, sample {index + 1} of {len(fed)}", index / len(fed))
        every.append(_measured(name, a, b, feeds, asked.hooks))
    tolerance, dtypes = tolerance_of(a, b), a.dtypes | b.dtypes
    outputs = tuple(worst(group) for group in zip(*every, strict=True))
    return ComponentComparison(
        component=name,
        a=a.label,
        b=b.label,
        verdict=_verdict(outputs, tolerance),
        allowed=tolerance.relative_l2,
        reason=tolerance.reason,
        passes=tuple(step.spec for step in passes_between(a, b)),
        dtypes=tuple(sorted(dtypes)),
        shapes=shapes,
        outputs=outputs,
        samples=len(every),
        errors=tuple(tuple(one.relative_l2 for one in group) for group in every),
    )


def _measured(name: str, a: Opened, b: Opened, feeds: Feeds, hooks: Hooks) -> tuple[Figures, ...]:
    """Every output of both on one set of inputs."""
    found_a, found_b = a.run(feeds), b.run(feeds)
    if found_a.keys() != found_b.keys():
        raise UsageError(
            f"these two have different outputs of {name}",
            where=f"{a.label} and {b.label}",
            why=f"{', '.join(found_a)} against {', '.join(found_b)}",
        )
    for key, value in found_a.items():
        if value.shape != found_b[key].shape:
            raise UsageError(
                f"the output {key} of {name} has another shape on each side",
                where=f"{a.label} and {b.label}",
                why=f"{list(value.shape)} against {list(found_b[key].shape)}",
            )
    outputs = tuple(figures(key, value, found_b[key]) for key, value in found_a.items())
    return outputs + _final(hooks, found_a, found_b)


def _final(
    hooks: Hooks, a: dict[str, np.ndarray], b: dict[str, np.ndarray]
) -> tuple[Figures, ...]:
    """What becomes of the outputs in the end, as ``postprocess/NAME``."""
    left, right = hooks.after(a), hooks.after(b)
    if left.keys() != right.keys():
        raise UsageError(
            "postprocess gave other names for each side",
            where=hooks.where,
            why=f"{', '.join(left)} against {', '.join(right)}",
            hint="return empty arrays for what was not found",
        )
    return tuple(
        figures_of_any(f"postprocess/{key}", value, right[key]) for key, value in left.items()
    )


def _verdict(outputs: Sequence[Figures], tolerance: Tolerance) -> Verdict:
    if not all(one.finite for one in outputs):
        return "different"
    if tolerance.relative_l2 is None:
        return "unjudged"
    limit = tolerance.relative_l2
    return "same" if all(one.within(limit) for one in outputs) else "different"


def _line(one: Figures) -> str:
    if one.shape_a is not None:
        return f"{one.name}: a is {list(one.shape_a)}, b {list(one.shape)}"
    if not one.finite:
        return (
            f"{one.name}: a holds {one.nan_a} NaN and {one.inf_a} infinities, "
            f"b {one.nan_b} and {one.inf_b}"
        )
    return (
        f"{one.name}: relative L2 {one.relative_l2:.2e}, max abs {one.max_abs:.2e}, "
        f"cosine {one.cosine:.6f}, PSNR {one.psnr_db:.1f} dB"
    )
