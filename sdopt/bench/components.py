"""Timing components: their sessions take turns on the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from sdopt.bench import feeds
from sdopt.bench.rows import Contestant, plan_of, replaces_steps
from sdopt.bench.settings import Settings
from sdopt.bench.tables import ComponentBench, Measured
from sdopt.bench.timing import Turns
from sdopt.bundle import Bundle
from sdopt.report import Progress
from sdopt.runtime.scheduled import Scheduled
from sdopt.session import Session

MILLI = 1000.0


class Calls:
    """A session that takes its turns with ``per_round`` calls of the samples, in their order."""

    def __init__(
        self, session: Session, samples: Sequence[Mapping[str, np.ndarray]], per_round: int
    ) -> None:
        self._session, self._samples, self._per_round = session, samples, per_round
        self.laps: list[Counter[str]] = []
        """How often each graph was computed, per round, the warm-up's counted too."""

    def settle(self) -> None:
        """The last sample: of a run of steps the lowest timestep, so that a new run follows."""
        self._session.run(self._samples[-1])

    def run(self, index: int) -> None:
        """The next samples, from the first again after the last."""
        before = self._computed()
        first = index * self._per_round
        for number in range(first, first + self._per_round):
            self._session.run(self._samples[number % len(self._samples)])
        self.laps.append(self._computed() - before or Counter(main=self._per_round))

    def _computed(self) -> Counter[str]:
        return Counter(self._session.calls if isinstance(self._session, Scheduled) else {})


def measure(
    bundle: Bundle,
    component: str,
    rows: Sequence[Contestant],
    settings: Settings,
    turns: Turns,
    tell: Progress,
) -> ComponentBench:
    """Let the rows that have a component take turns; their sessions are open at the same time.

    Where a row computes some steps by another graph (``deep_cache``), a round is a whole run of
    timesteps in every row: single calls would compare a full step with a shallow one.

    Raises:
        SdoptError: a graph that cannot be opened, or refuses its inputs.
    """
    sessions, seconds = [], []
    for row in rows:
        start = turns.clock()
        sessions.append(row.open(component))
        seconds.append(turns.clock() - start)
    steps = any(replaces_steps(plan_of(row.stages[component])) for row in rows)
    first = rows[0].stages[component]
    made = feeds.make(bundle, first, sessions[0].inputs, settings, steps=steps)
    fed = [
        made.for_ports(session.inputs, f"{row.stages[component].path} on {row.text}")
        for row, session in zip(rows, sessions, strict=True)
    ]
    per_round = len(made.samples) if steps else 1
    contenders = [
        Calls(session, samples, per_round) for session, samples in zip(sessions, fed, strict=True)
    ]
    laps, settled = turns.take(contenders, tell)
    return ComponentBench(
        component=component,
        role=first.record.role,
        feeds=made.said,
        shapes={name: array.shape for name, array in fed[0][0].items()},
        dtypes={name: str(array.dtype) for name, array in fed[0][0].items()},
        calls_per_round=per_round,
        settled=settled,
        rows=tuple(
            Measured(
                row=row.label,
                load_seconds=load,
                warm_up=tuple(one * MILLI / per_round for one in lap.warm_up),
                rounds=tuple(one * MILLI / per_round for one in lap.rounds),
                calls=dict(sum(one.laps[turns.warm_up :], Counter())),
            )
            for row, one, lap, load in zip(rows, contenders, laps, seconds, strict=True)
        ),
    )
