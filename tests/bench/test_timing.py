"""Who takes a turn when, what counts, and what rests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from sdopt.bench import images
from sdopt.bench.timing import Turns
from sdopt.runtime.scheduled import Holding
from sdopt.session import Port
from tests.bench.planted import Clock, Planted


class Runner:
    """Takes its durations in turn, and writes down what it was asked."""

    def __init__(self, name: str, clock: Clock, durations: list[float], log: list[str]) -> None:
        self._name, self._clock, self._log = name, clock, log
        self._durations = iter(durations)

    def settle(self) -> None:
        self._log.append(f"{self._name} settles")
        self._clock.now += 100.0

    def run(self, index: int) -> None:
        self._log.append(f"{self._name}{index}")
        self._clock.now += next(self._durations)


def turns(clock: Clock, log: list[str], rounds: int, warm_up: int, pause: float = 0.5) -> Turns:
    def sleep(seconds: float) -> None:
        log.append("rest")
        clock.now += seconds

    return Turns(rounds, warm_up, pause, clock, sleep)


def test_rows_alternate_and_only_rounds_count() -> None:
    clock, log = Clock(), list[str]()
    first = Runner("A", clock, [9.0, 8.0, 1.0, 2.0], log)
    second = Runner("B", clock, [7.0, 6.0, 3.0, 4.0], log)
    told: list[tuple[str, float]] = []
    laps, settled = turns(clock, log, rounds=2, warm_up=2).take(
        [first, second], lambda what, share: told.append((what, share))
    )
    assert " ".join(log) == "A0 B0 A1 B1 rest A2 rest B2 rest A3 rest B3"
    assert [(one.warm_up, one.rounds) for one in laps] == [
        ([9.0, 8.0], [1.0, 2.0]),
        ([7.0, 6.0], [3.0, 4.0]),
    ]
    assert not settled, "these are slow"
    assert told == [
        ("warm-up 1 of 2", 0.0),
        ("warm-up 2 of 2", 0.25),
        ("round 1 of 2", 0.5),
        ("round 2 of 2", 0.75),
    ]


def test_where_one_is_quick_all_settle_and_none_is_timed_for_it() -> None:
    clock, log = Clock(), list[str]()
    first = Runner("A", clock, [5.0, 1.0], log)
    second = Runner("B", clock, [0.0625, 0.0625], log)
    laps, settled = turns(clock, log, rounds=1, warm_up=1, pause=0.0).take(
        [first, second], lambda *_: None
    )
    assert settled
    assert " ".join(log) == "A0 B0 A settles A1 B settles B1"
    assert [one.rounds for one in laps] == [[1.0], [0.0625]]


def test_what_must_not_settle_does_not() -> None:
    clock, log = Clock(), list[str]()
    one = Runner("A", clock, [0.0, 0.0], log)
    _, settled = turns(clock, log, 1, 1).take([one], lambda *_: None, settle=False)
    assert not settled
    assert " ".join(log) == "A0 rest A1"


class _OnCard:
    """A session on a device, for what a clock around it lets through."""

    inputs: ClassVar[dict[str, Port]] = {}
    outputs: ClassVar[dict[str, Port]] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise AssertionError("through memory")

    def holds(self) -> bool:
        return True

    def run_held(
        self, feeds: Mapping[str, Any], held: Collection[str], *, keep: bool
    ) -> dict[str, Any]:
        return {"kept": (set(held), keep)}


def test_a_clock_leaves_values_on_the_card() -> None:
    watch = images.Stopwatch(Clock(tick=2.5))
    timed = images.Timed(_OnCard(), "unet", watch)
    assert isinstance(timed, Holding)
    assert timed.holds()
    assert timed.run_held({}, ["deep"], keep=True) == {"kept": ({"deep"}, True)}
    assert watch.lap() == ({"unet": 2.5}, {"unet": 1})
    assert not images.Timed(Planted(None, Clock(), []), "unet", watch).holds()
