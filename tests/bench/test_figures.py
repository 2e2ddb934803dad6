"""Figures of planted durations, worked out by hand."""

from __future__ import annotations

import pytest

from sdopt.bench.figures import Ratio, Spread
from sdopt.errors import UsageError


def test_a_spread_by_hand() -> None:
    one = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (one.count, one.min, one.max, one.mean, one.p50) == (5, 1.0, 5.0, 3.0, 3.0)
    # Position 0.95 * 4 = 3.8 among 0..4: between 4 and 5.
    assert one.p95 == pytest.approx(4.8)
    assert (one.p25, one.p75, one.iqr) == (2.0, 4.0, 2.0)
    assert one.stdev == pytest.approx((10 / 4) ** 0.5)
    assert one.noisy, "4.8 is more than 1.5 times 3"


def test_a_single_round_has_no_deviation() -> None:
    one = Spread.of([7.0])
    assert (one.p50, one.p95, one.stdev) == (7.0, 7.0, None)
    assert not one.noisy


def test_noisy_begins_above_one_and_a_half() -> None:
    assert not Spread.of([2.0, 2.0, 3.0]).noisy
    assert Spread.of([2.0, 2.0, 3.2]).p95 == pytest.approx(3.08)
    assert Spread.of([2.0, 2.0, 3.2]).noisy


def test_a_ratio_is_that_of_the_same_round() -> None:
    one = Ratio.between([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    assert (one.p50, one.p25, one.p75) == (2.0, 1.75, 3.0)
    assert one.of_totals == 13 / 5
    # The ratio of the medians would be 1.5.


def test_nothing_to_say() -> None:
    with pytest.raises(UsageError, match="no round"):
        Spread.of([])
    with pytest.raises(UsageError, match="2 rounds cannot be compared with 1"):
        Ratio.between([1.0, 2.0], [1.0])
    with pytest.raises(UsageError, match="0 rounds"):
        Ratio.between([], [])
