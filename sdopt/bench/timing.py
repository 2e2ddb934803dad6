"""Taking turns: every row once in each round, so that a slow moment of the machine hits all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sdopt.report import Progress

Clock = Callable[[], float]
"""Seconds from any zero."""

SETTLED = 0.1
"""Rows whose calls take less than this many seconds get an untimed call before each timed one."""


class Contender(Protocol):
    """One of the things that take turns."""

    def settle(self) -> None:
        """A short call that is not timed, where one leaves no trace in those that are."""

    def run(self, index: int) -> None:
        """Round number ``index``, the warm-up's counted too."""


@dataclass
class Laps:
    """What one contender took, in seconds per round."""

    warm_up: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Turns:
    """How contenders take turns.

    Attributes:
        rounds: that count.
        warm_up: rounds before those, which do not.
        pause: seconds of rest before each timed turn. onnxruntime's threads spin for tens of
            milliseconds after a call, and would take a core from whoever is next.
        clock: what is read before and after a turn.
        sleep: what rests.
    """

    rounds: int
    warm_up: int
    pause: float = 0.1
    clock: Clock = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def take(
        self, contenders: Sequence[Contender], tell: Progress, *, settle: bool = True
    ) -> tuple[list[Laps], bool]:
        """Let each run once per round: A, B, C, A, B, C, ...

        Returns:
            The laps in the contenders' order, and whether untimed calls went before timed ones.
        """
        laps = [Laps() for _ in contenders]
        total = self.warm_up + self.rounds
        for index in range(self.warm_up):
            tell(f"warm-up {index + 1} of {self.warm_up}", index / total)
            for one, lap in zip(contenders, laps, strict=True):
                lap.warm_up.append(self._timed(one, index))
        # Decided once and for all rows, or they would not be treated alike.
        quick = any(lap.warm_up and lap.warm_up[-1] < SETTLED for lap in laps)
        settling = settle and quick
        for index in range(self.warm_up, total):
            tell(f"round {index - self.warm_up + 1} of {self.rounds}", index / total)
            for one, lap in zip(contenders, laps, strict=True):
                if self.pause:
                    self.sleep(self.pause)
                if settling:
                    one.settle()
                lap.rounds.append(self._timed(one, index))
        return laps, settling

    def _timed(self, one: Contender, index: int) -> float:
        start = self.clock()
        one.run(index)
        return self.clock() - start
