"""The comparison of two sides and its verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdopt.compare import inputs
from sdopt.compare.figures import Figures, figures, figures_of_any
from sdopt.compare.hooks import Hooks, load
from sdopt.compare.sides import Opened, Side, side
from sdopt.errors import UnknownNameError, UsageError
from sdopt.manifest import Step
from sdopt.report import Progress, part
from sdopt.spec import parse, suggest
from sdopt.tolerance import Change, Intent, Numerics, Tolerance, between

Verdict = Literal["same", "different", "unjudged"]


@dataclass(frozen=True)
class ComponentComparison:
    """One component of both sides on one set of inputs.

    ``passes`` are those that only one side went through; ``allowed`` is the relative L2 that they
    allow, None where only images can tell; ``shapes`` are those of the inputs.
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


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; ``skipped`` are components that only one side has."""

    a: str
    b: str
    seed: int
    components: tuple[ComponentComparison, ...]
    skipped: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the passes between allow."""
        return all(one.verdict != "different" for one in self.components)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; a figure that is no finite number is None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {**plain, "passed": self.passed}

    def lines(self) -> list[str]:
        """The report for people, a line per component and per output."""
        found = [f"a: {self.a}", f"b: {self.b} (the reference)"]
        for one in self.components:
            allowed = "" if one.allowed is None else f", up to {one.allowed:g}"
            found.append(f"{one.component}: {one.verdict} ({one.reason}{allowed})")
            found += [f"  {_line(output)}" for output in one.outputs]
        found += [f"{name}: only one side has it" for name in self.skipped]
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
        progress: is told the component.

    Raises:
        UsageError: a pair that cannot be compared (other inputs, other outputs, no graph).
        UnknownNameError: a component or stage that is not there.
    """
    around = load(hooks) if hooks is not None else Hooks("")
    left, right = side(a, target), side(b, target)
    pairs, skipped = _pairs(left, right, components or None)
    found = []
    for index, (name_a, name_b) in enumerate(pairs):
        name = name_b if left.anonymous else name_a
        part(progress, index, len(pairs))(name, 0.0)
        opened = left.components[name_a](name_a), right.components[name_b](name_b)
        found.append(_compare(name, *opened, seed, sizes or {}, around))
    return Comparison(str(a), str(b), seed, tuple(found), skipped)


def _pairs(
    left: Side, right: Side, asked: Sequence[str] | None
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """The names on both sides of what is compared, and the components left out."""
    if left.anonymous or right.anonymous:
        named = right if left.anonymous else left
        (file,) = (left if left.anonymous else right).components
        if not (left.anonymous and right.anonymous):
            if asked is None and len(named.components) > 1:
                raise UsageError(
                    "which component is this file?",
                    where=(left if left.anonymous else right).label,
                    hint=f"name it: --component {' or '.join(named.components)}",
                )
            (other,) = _known(named, asked or list(named.components))
        else:
            (other,) = named.components
        return [(file, other) if left.anonymous else (other, file)], ()
    shared = [name for name in left.components if name in right.components]
    if asked is not None:
        _known(left, asked)
        _known(right, asked)
        return [(name, name) for name in asked], ()
    if not shared:
        raise UsageError(
            "these two have no component in common",
            where=f"{left.label} and {right.label}",
            why=f"{', '.join(left.components)} against {', '.join(right.components)}",
        )
    skipped = {*left.components, *right.components} - set(shared)
    return [(name, name) for name in shared], tuple(sorted(skipped))


def _known(one: Side, asked: Sequence[str]) -> Sequence[str]:
    for name in asked:
        if name not in one.components:
            raise UnknownNameError(
                f"there is no {name!r} to compare",
                where=one.label,
                hint=suggest(name, one.components),
            )
    return asked


def _compare(
    name: str, a: Opened, b: Opened, seed: int, sizes: Mapping[str, int], hooks: Hooks
) -> ComponentComparison:
    ports_a, ports_b = a.ports or b.ports, b.ports or a.ports
    if ports_a is None or ports_b is None:
        raise UsageError(
            "two checkpoints have no graph to compare",
            where=f"{a.label} and {b.label}",
            hint="export one of them: sdopt export SOURCE -o BUNDLE",
        )
    ports = inputs.agreed_ports(ports_a, ports_b, (a.label, b.label))
    limits = {
        dim: min(size, inputs.SIZES[dim])
        for dim, size in {**a.sizes, **b.sizes}.items()
        if any(dim in port.dims for port in ports.values())
    }
    vocabularies = {
        key: min(one.vocabularies[key] for one in (a, b) if key in one.vocabularies)
        for key in {*a.vocabularies, *b.vocabularies}
    }
    feeds = hooks.before(inputs.make(ports, seed, {**limits, **sizes}, vocabularies))
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
    outputs += _final(hooks, found_a, found_b)
    steps = _between(a, b)
    dtypes = a.dtypes | b.dtypes
    tolerance = _tolerance(a, b, steps, dtypes)
    return ComponentComparison(
        component=name,
        a=a.label,
        b=b.label,
        verdict=_verdict(outputs, tolerance),
        allowed=tolerance.relative_l2,
        reason=tolerance.reason,
        passes=tuple(step.spec for step in steps),
        dtypes=tuple(sorted(dtypes)),
        shapes={key: feed.shape for key, feed in feeds.items()},
        outputs=outputs,
    )


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


def _between(a: Opened, b: Opened) -> tuple[Step, ...]:
    """The passes that only one of the two went through; with another file it is another pass."""
    shared = 0
    if a.origin is not None and a.origin == b.origin:
        for one, other in zip(a.history, b.history, strict=False):
            if (one.spec, one.reads) != (other.spec, other.reads):
                break
            shared += 1
    return a.history[shared:] + b.history[shared:]


def _tolerance(a: Opened, b: Opened, steps: Sequence[Step], dtypes: frozenset[str]) -> Tolerance:
    changes = [
        Change(parse(step.spec)[0].name, Numerics(step.numerics), Intent(step.intent))
        for step in steps
    ]
    if a.origin is None or a.origin != b.origin:
        # Two exporters, or PyTorch's own kernels.
        changes.append(Change("another origin", Numerics.REASSOCIATED))
    return between(changes, dtypes)


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


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
