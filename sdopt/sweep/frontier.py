"""Which points are worth having: the frontier of time, memory and quality, and one to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sdopt.errors import UsageError
from sdopt.sweep.result import AXES, Point, Result

Values = Mapping[str, float]
"""A point's value on each axis, by its name."""


def cost(axis: str, value: float) -> float:
    """A value such that less is better: of a score its negative."""
    return -value if axis == "score" else value


def dominates(one: Values, other: Values, axes: Sequence[str]) -> bool:
    """Whether ``one`` is at least as good on every axis, and better on one."""
    pairs = [(cost(axis, one[axis]), cost(axis, other[axis])) for axis in axes]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def beats(one: Values, other: Values, axes: Sequence[str]) -> bool:
    """Whether ``one`` is better on every axis."""
    return all(cost(axis, one[axis]) < cost(axis, other[axis]) for axis in axes)


def on_frontier(points: Mapping[str, Values], axes: Sequence[str]) -> set[str]:
    """The names of the points that no other one dominates."""
    return {
        name
        for name, one in points.items()
        if not any(dominates(other, one, axes) for other in points.values())
    }


def values_of(point: Point, axes: Sequence[str]) -> Values | None:
    """A point's value on every axis; None where one was not measured."""
    found = {axis: value for axis in axes if (value := getattr(point, axis)) is not None}
    return found if len(found) == len(axes) else None


def best(
    result: Result,
    *,
    max_ms: float | None = None,
    max_gb: float | None = None,
    min_score: float | None = None,
    shape: str | None = None,
    target: str | None = None,
) -> Point:
    """The point to use, of those within the limits.

    With ``min_score`` it is the fastest, else the best by score; ties go to the next axis.

    Args:
        result: of a sweep.
        max_ms: milliseconds per image at most.
        max_gb: of memory at most, a GB being 1e9 bytes.
        min_score: at least.
        shape: HEIGHTxWIDTH; must be given where there are several.
        target: only points of that target.

    Raises:
        UsageError: no point is within the limits; says how near the nearest came.
    """
    limits: dict[str, tuple[str, float]] = {}
    for axis, value, word in (
        ("ms", max_ms, "--max-ms"),
        ("memory_bytes", None if max_gb is None else max_gb * 1e9, "--max-gb"),
        ("score", min_score, "--min-score"),
    ):
        if value is None:
            continue
        if axis not in result.axes:
            raise UsageError(
                f"{word} needs what this sweep did not measure",
                where=str(result.folder),
                why=f"it measured {', '.join(result.axes)}",
            )
        limits[axis] = (word, value)
    points = _eligible(result, shape, target)
    within = [
        one for one in points if all(_meets(one, axis, at) for axis, (_, at) in limits.items())
    ]
    if not within:
        raise UsageError(
            "no point is within these limits",
            where=str(result.folder),
            why="; ".join(
                f"{word} {_told(axis, at)}: the best is {_told(axis, _reach(points, axis))}"
                for axis, (word, at) in limits.items()
            )
            + ("" if len(limits) == 1 else ", each for itself"),
            hint="give up a limit, or sweep over more recipes",
        )
    order = ("ms", "score", "memory_bytes") if min_score is not None else ("score", "ms", *AXES)
    axes = [axis for axis in order if axis in result.axes]
    rank: Callable[[Point], list[float]] = lambda one: [  # noqa: E731 -- typed here
        cost(axis, getattr(one, axis)) for axis in axes
    ]
    return min(within, key=rank)


def _eligible(result: Result, shape: str | None, target: str | None) -> list[Point]:
    done = [one for one in result.points if one.state == "done" and values_of(one, result.axes)]
    found = [one for one in done if shape in (None, one.shape) and target in (None, one.target)]
    if not found:
        raise UsageError(
            "there is no finished point to choose from" + " of these" * bool(done),
            where=str(result.folder),
            hint=f"it has {', '.join(sorted({f'{p.target} at {p.shape}' for p in done}))}"
            if done
            else "let the sweep end: run the same command again",
        )
    sizes = dict.fromkeys(one.shape for one in found)
    if len(sizes) > 1:
        raise UsageError(
            "which size is it for?",
            where=str(result.folder),
            why="the smallest would always be the fastest",
            hint=f"--shapes {' or '.join(sizes)}",
        )
    return found


def _meets(point: Point, axis: str, limit: float) -> bool:
    return cost(axis, getattr(point, axis)) <= cost(axis, limit)


def _reach(points: Sequence[Point], axis: str) -> float:
    return min((float(getattr(one, axis)) for one in points), key=lambda value: cost(axis, value))


def _told(axis: str, value: float) -> str:
    return f"{value / 1e9:.3g} GB" if axis == "memory_bytes" else f"{value:.4g}"
