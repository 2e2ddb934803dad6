"""What each choice of a sweep is worth, apart from all the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sdopt.sweep.result import Point

Measure = Literal["ms", "memory_bytes", "score"]

MEASURES: tuple[Measure, ...] = ("ms", "memory_bytes", "score")
RATIOS: tuple[Measure, ...] = ("ms", "memory_bytes")
"""Measures whose effects are factors; that of a score is a difference."""

WITHOUT = ""
"""The choice to leave a pass out."""

_ESTIMABLE = 1e-8


@dataclass(frozen=True)
class Effect:
    """What one choice changes against the first one of its option.

    Attributes:
        value: a factor of time and memory (0.9: a tenth less), a difference of a score.
        error: its standard error, of a factor as a share of it; None where there are no more
            points than choices.
    """

    value: float
    error: float | None


@dataclass(frozen=True)
class Choice:
    """One choice of one option.

    Attributes:
        option: its name.
        value: what was chosen.
        base: the option's first choice, against which effects are.
        points: how many points have it.
        effects: by measure; one that cannot be told from those of other options is left out.
    """

    option: str
    value: str
    base: str
    points: int
    effects: Mapping[Measure, Effect]


def choices_of(point: Point) -> dict[str, str]:
    """All that was chosen for a point: options of the recipe, target, size and batch."""
    given = {"target": point.target, "shape": point.shape, "batch": str(point.batch)}
    return {**point.choices, **{key: given[key] for key in given if key not in point.choices}}


def effects(points: Sequence[Point]) -> list[Choice]:
    """The marginal effect of every choice.

    They are estimated from all measured points at once, by least squares on the scores and on the
    logarithms of times and bytes, as if options did not depend on one another. On a full grid that
    is the plain difference between means.
    """
    chosen = [choices_of(point) for point in points]
    options: dict[str, dict[str, int]] = {name: {} for one in chosen for name in one}
    for one in chosen:
        for name, counts in options.items():
            value = one.get(name, WITHOUT)
            counts[value] = counts.get(value, 0) + 1
    varied = {name: counts for name, counts in options.items() if len(counts) > 1}
    columns = [(name, value) for name, counts in varied.items() for value in list(counts)[1:]]
    found: dict[tuple[str, str], dict[Measure, Effect]] = {one: {} for one in columns}
    for measure in MEASURES:
        for column, effect in _fit(points, columns, measure).items():
            found[column][measure] = effect
    return [
        Choice(name, value, next(iter(counts)), count, found.get((name, value), {}))
        for name, counts in varied.items()
        for value, count in counts.items()
    ]


def _fit(
    points: Sequence[Point], columns: Sequence[tuple[str, str]], measure: Measure
) -> dict[tuple[str, str], Effect]:
    """The effects on one measure, of those columns that can be told apart."""
    measured = [
        (choices_of(point), float(value))
        for point in points
        if (value := getattr(point, measure)) is not None
    ]
    if not measured or not columns:
        return {}
    logarithm = measure in RATIOS
    results = np.array([math.log(value) if logarithm else value for _, value in measured])
    design = np.array(
        [
            [1.0, *(float(chosen.get(name, WITHOUT) == value) for name, value in columns)]
            for chosen, _ in measured
        ]
    )
    inverse = np.linalg.pinv(design)
    fitted = inverse @ results
    told_apart = _estimable(inverse @ design)
    left = len(results) - int(np.linalg.matrix_rank(design))
    residual = results - design @ fitted
    variance = float(residual @ residual) / left if left > 0 else None
    spread = np.diag(inverse @ inverse.T)
    found = {}
    for index, column in enumerate(columns, start=1):
        if told_apart[index]:
            error = None if variance is None else math.sqrt(variance * spread[index])
            value = math.exp(fitted[index]) if logarithm else float(fitted[index])
            found[column] = Effect(value, error)
    return found


def _estimable(projection: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which coefficients the points determine: those whose unit vector is in the row space."""
    off: npt.NDArray[np.float64] = np.abs(projection - np.eye(len(projection))).max(axis=1)
    return np.less(off, _ESTIMABLE)
