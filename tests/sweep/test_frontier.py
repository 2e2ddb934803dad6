"""The frontier by its definition, and the point to use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.errors import UsageError
from sdopt.sweep.frontier import beats, best, dominates, on_frontier
from sdopt.sweep.result import AXES, Point, Result

VALUES = st.fixed_dictionaries({axis: st.integers(0, 4).map(float) for axis in AXES})


@given(st.lists(VALUES, min_size=1, max_size=9))
def test_the_frontier_is_what_nothing_is_better_than(points: list[dict[str, float]]) -> None:
    named = {str(index): one for index, one in enumerate(points)}
    found = on_frontier(named, AXES)
    assert found, "something is always on it"
    for name, one in named.items():
        better = [
            other
            for other in named.values()
            if other["ms"] <= one["ms"]
            and other["memory_bytes"] <= one["memory_bytes"]
            and other["score"] >= one["score"]
            and other != one
        ]
        assert (name in found) == (not better)
        # What is given up early is never on it.
        if any(beats(other, one, AXES) for other in named.values()):
            assert name not in found


def test_better_is_less_time_and_more_score() -> None:
    good, slow = {"ms": 1.0, "score": 0.9}, {"ms": 2.0, "score": 0.9}
    assert dominates(good, slow, ("ms", "score"))
    assert not dominates(slow, good, ("ms", "score"))
    assert not beats(good, slow, ("ms", "score"))
    assert beats(good, {"ms": 2.0, "score": 0.8}, ("ms", "score"))
    assert not dominates(good, good, ("ms", "score"))


def point(recipe: str, ms: float | None, gb: float, score: float, **others: object) -> Point:
    plain: dict[str, object] = {
        "key": recipe,
        "recipe": recipe,
        "target": "ort",
        "shape": "64x64",
        "batch": 1,
        "choices": {},
        "state": "done",
        "ms": ms,
        "memory_bytes": int(gb * 1e9),
        "score": score,
    }
    return Point(**{**plain, **others})  # type: ignore[arg-type]


def result(*points: Point, axes: tuple[str, ...] = AXES) -> Result:
    return Result(Path("s"), Path("s/work"), "b", "o", {}, axes, "", "", "", "", points)


SWEPT = result(
    point("slow", 60, 1.0, 0.99),
    point("good", 38, 2.0, 0.95),
    point("quick", 20, 1.5, 0.91),
    point("bad", 10, 0.5, 0.5),
    point("stopped", 1, 0.1, 1.0, state="stopped"),
    point("failed", None, 0, 0, state="failed"),
)


@pytest.mark.parametrize(
    ("limits", "recipe"),
    [
        ({"max_ms": 40, "min_score": 0.9}, "quick"),
        ({"max_ms": 40}, "good"),
        ({"min_score": 0.92}, "good"),
        ({"min_score": 0.96}, "slow"),
        ({"max_gb": 1.0}, "slow"),
        ({"max_gb": 0.9}, "bad"),
        ({"max_ms": 40, "max_gb": 1.9}, "quick"),
        ({}, "slow"),
    ],
)
def test_the_point_to_use(limits: dict[str, float], recipe: str) -> None:
    assert best(SWEPT, **limits).recipe == recipe


def test_limits_that_nothing_meets_say_how_near_it_comes() -> None:
    with pytest.raises(UsageError) as caught:
        best(SWEPT, max_ms=15, min_score=0.9)
    assert "--max-ms 15: the best is 10" in str(caught.value)
    assert "--min-score 0.9: the best is 0.99" in str(caught.value)


def test_sizes_are_not_mixed_and_what_was_not_measured_is_no_limit() -> None:
    both = result(*SWEPT.points, point("large", 90, 3, 0.97, shape="128x128"))
    with pytest.raises(UsageError, match="which size") as caught:
        best(both, max_ms=40)
    assert "--shapes 64x64 or 128x128" in str(caught.value)
    assert best(both, shape="128x128").recipe == "large"
    with pytest.raises(UsageError, match="no finished point"):
        best(both, shape="32x32")
    with pytest.raises(UsageError, match="did not measure"):
        best(result(*SWEPT.points, axes=("ms", "score")), max_gb=1)
    with pytest.raises(UsageError, match="no finished point"):
        best(result(point("pending", 1, 1, 1, state="pending")))
