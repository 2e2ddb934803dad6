"""Which candidates of a space are tried, and in what order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sdopt import spec
from sdopt.errors import MissingDependencyError, UnknownNameError, UsageError
from sdopt.sweep.candidate import Candidate
from sdopt.sweep.frontier import Values, cost
from sdopt.sweep.space import Space

SAMPLERS = ("grid", "random", "tpe", "nsgaii")
AT_ONCE = 4
"""Candidates that Optuna is asked for before it is told; not the number of workers, so that the
same sweep tries the same points wherever it runs."""


class Sampler(Protocol):
    """Chooses candidates in rounds."""

    def ask(self) -> Sequence[Candidate]:
        """The candidates of the next round; none when it is over."""

    def tell(self, candidate: Candidate, values: Values | None) -> None:
        """What a candidate of the last round came to; None where it failed or was given up."""


@dataclass(frozen=True)
class Sampling:
    """How a space is searched.

    Attributes:
        sampler: of ``SAMPLERS``; ``tpe`` and ``nsgaii`` are Optuna's.
        budget: candidates that are tried at most; all by default, which a grid always does.
        seed: of what draws.
    """

    sampler: str = "grid"
    budget: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.sampler not in SAMPLERS:
            raise UnknownNameError(
                f"no sampler is called {self.sampler!r}", hint=spec.suggest(self.sampler, SAMPLERS)
            )
        if self.budget is not None and self.budget < 1:
            raise UsageError(f"the budget must be 1 or more, not {self.budget}")
        if self.budget is not None and self.sampler == "grid":
            raise UsageError(
                "a grid has no budget: it is every point", hint="--sampler random, or tpe"
            )
        if self.budget is None and self.sampler != "grid":
            raise UsageError(f"how many points may {self.sampler} try?", hint="--budget 20")

    def make(self, space: Space, axes: Sequence[str]) -> Sampler:
        """The sampler of a space.

        Raises:
            SdoptError: see ``Space.candidates``.
            MissingDependencyError: Optuna is not installed.
        """
        every = space.candidates()
        if self.sampler == "grid":
            return Listed(every)
        budget = min(self.budget or len(every), len(every))
        if self.sampler == "random":
            return Listed(random.Random(self.seed).sample(every, budget))
        return Asked(self, space, axes, budget)


class Listed:
    """Candidates that are known beforehand, in one round."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._left: Sequence[Candidate] = candidates

    def ask(self) -> Sequence[Candidate]:
        """All of them, once."""
        found, self._left = self._left, ()
        return found

    def tell(self, candidate: Candidate, values: Values | None) -> None:
        """Nothing: it is decided."""


class Asked:
    """Candidates that one of Optuna's samplers asks for, given what earlier ones came to.

    A candidate that it asks for again costs nothing, and not of the budget either.
    """

    def __init__(self, sampling: Sampling, space: Space, axes: Sequence[str], budget: int) -> None:
        optuna = _optuna()
        made = {"tpe": optuna.samplers.TPESampler, "nsgaii": optuna.samplers.NSGAIISampler}
        self._space, self._axes, self._budget = space, axes, budget
        self._study = optuna.create_study(
            directions=["minimize"] * len(axes), sampler=made[sampling.sampler](seed=sampling.seed)
        )
        self._failed = optuna.trial.TrialState.FAIL
        self._waiting: dict[Candidate, list[Any]] = {}
        self._told: dict[Candidate, Values | None] = {}

    def ask(self) -> Sequence[Candidate]:
        """Candidates that were not tried yet, a few at a time."""
        axes = self._space.axes()
        # A sampler may ask for what is known for ever; then the budget is not used up.
        for _ in range(100 * self._budget):
            count = len(self._told) + len(self._waiting)
            if count >= self._budget or len(self._waiting) >= AT_ONCE:
                break
            trial = self._study.ask()
            chosen = {name: trial.suggest_categorical(name, v) for name, v in axes.items()}
            candidate = self._space.at(chosen)
            if candidate in self._told:
                self._tell(trial, self._told[candidate])
            else:
                self._waiting.setdefault(candidate, []).append(trial)
        return list(self._waiting)

    def tell(self, candidate: Candidate, values: Values | None) -> None:
        """Let every trial that asked for it know."""
        self._told[candidate] = values
        for trial in self._waiting.pop(candidate):
            self._tell(trial, values)

    def _tell(self, trial: Any, values: Values | None) -> None:
        if values is None:
            self._study.tell(trial, state=self._failed)
        else:
            self._study.tell(trial, [cost(axis, values[axis]) for axis in self._axes])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingDependencyError(
            "samplers that learn from earlier points need Optuna",
            why=str(error),
            hint='pip install "sdopt[sweep]", or --sampler random',
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
