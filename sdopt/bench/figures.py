"""What is said of a list of durations, and of two lists that were measured in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdopt.errors import UsageError

NOISY = 1.5
"""A p95 above this many times the p50 is called noisy."""


@dataclass(frozen=True)
class Spread:
    """Durations in figures, in the unit that they are in.

    Percentiles are interpolated linearly between the two nearest durations. ``stdev`` is that of
    a sample (n - 1), None for a single duration.
    """

    count: int
    p50: float
    p95: float
    mean: float
    min: float
    max: float
    p25: float
    p75: float
    stdev: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The figures of one or more durations.

        Raises:
            UsageError: there is none.
        """
        if not values:
            raise UsageError("no round was measured", hint="--rounds 1 or more")
        p25, p50, p75, p95 = (float(one) for one in np.percentile(values, (25, 50, 75, 95)))
        return cls(
            count=len(values),
            p50=p50,
            p95=p95,
            mean=float(np.mean(values)),
            min=float(min(values)),
            max=float(max(values)),
            p25=p25,
            p75=p75,
            stdev=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        )

    @property
    def iqr(self) -> float:
        """The distance between the quartiles."""
        return self.p75 - self.p25

    @property
    def noisy(self) -> bool:
        """Whether the slowest rounds say more about the machine than about the graph."""
        return self.p95 > NOISY * self.p50


@dataclass(frozen=True)
class Ratio:
    """One row's time over the reference's: below 1 is faster.

    ``p50``, ``p25`` and ``p75`` are of the ratios of each round, ``of_totals`` is the ratio of
    the sums, which a few slow rounds move, and rounds that differ by design do not mislead.
    """

    p50: float
    p25: float
    p75: float
    of_totals: float

    @classmethod
    def between(cls, rounds: Sequence[float], reference: Sequence[float]) -> Ratio:
        """The ratio of two lists whose rounds were measured in turn.

        Raises:
            UsageError: unequal numbers of rounds, or none.
        """
        if not rounds or len(rounds) != len(reference):
            raise UsageError(
                f"{len(rounds)} rounds cannot be compared with {len(reference)}",
                why="the ratio is that of the same round, measured in turn",
            )
        pairs = [a / b for a, b in zip(rounds, reference, strict=True)]
        p25, p50, p75 = (float(one) for one in np.percentile(pairs, (25, 50, 75)))
        return cls(p50, p25, p75, sum(rounds) / sum(reference))
