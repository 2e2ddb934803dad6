"""What a sweep has found so far, as tables, JSON and pages tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdopt.passes.presets import PRESETS

SCHEMA = 1

State = Literal["done", "stopped", "failed", "pending"]

AXES = ("ms", "memory_bytes", "score")
"""Of the frontier: the first two are better when lower, the score when higher."""


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        prompt: its place among the prompts, from 0.
        text: of the prompt.
        seed: it was drawn from.
        path: of the PNG, relative to ``Result.work``.
        score: what the scorer gave it; None without one.
    """

    prompt: int
    text: str
    seed: int
    path: str
    score: float | None


@dataclass(frozen=True)
class Point:
    """One candidate and what it came to; what was not measured is None.

    Attributes:
        key: of the candidate.
        recipe: passes; empty for the raw graph.
        target: that it was built for.
        shape: HEIGHTxWIDTH in pixels.
        batch: images computed together.
        choices: what was chosen for each option of the space, by its name.
        state: ``done``, ``stopped`` early, ``failed``, or ``pending`` in a sweep that was killed.
        reason: why it was stopped or failed.
        ms: milliseconds per image, the median of the rounds.
        rounds: milliseconds per image of each round.
        denoiser_ms: milliseconds per call of the denoiser, the median.
        memory_bytes: the most that a process of its own held: of the card where it computes on
            one, else of the host.
        score: the mean over prompts of those that were drawn, higher is better.
        score_error: its standard error over prompts; None of a single one.
        prompts: how many were drawn.
        frontier: whether no other point of this size is at least as good on every axis that was
            measured and better on one.
        samples: the images.
        here: where it was timed, else where it was scored (``sdopt.sweep.provenance.here``).
        beside: labels of what else ran on the engine while it was timed.
        digests: of what its graphs compute before they are lowered, by component.
        command: one line that measures this point again.
    """

    key: str
    recipe: str
    target: str
    shape: str
    batch: int
    choices: Mapping[str, str]
    state: State
    reason: str = ""
    ms: float | None = None
    rounds: tuple[float, ...] = ()
    denoiser_ms: float | None = None
    memory_bytes: int | None = None
    score: float | None = None
    score_error: float | None = None
    prompts: int = 0
    frontier: bool = False
    samples: tuple[Sample, ...] = ()
    here: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def name(self) -> str:
        """The recipe for people: presets by their names, and the raw graph has one too."""
        for name, text in sorted(PRESETS.items(), key=lambda one: -len(one[1])):
            if "," in text and f"{self.recipe},".startswith(f"{text},"):
                return f"@{name}{self.recipe[len(text) :]}"
        return self.recipe or "raw"


@dataclass(frozen=True)
class Result:
    """A sweep as its folder tells it.

    Attributes:
        folder: of the sweep.
        work: the folder that samples' paths are relative to.
        bundle: as it was given.
        origin: of the bundle: what was exported.
        settings: what all points have in common (steps, guidance, seeds, scorer, ...).
        axes: which of ``AXES`` were measured.
        scorer: its name, empty without one.
        engine: what ran it last.
        command: as it was typed.
        date: when it was begun, ISO 8601 in UTC.
        points: in the order they were tried.
        notes: what a reader should know (other machines, timings beside other work).
    """

    folder: Path
    work: Path
    bundle: str
    origin: str
    settings: Mapping[str, Any]
    axes: tuple[str, ...]
    scorer: str
    engine: str
    command: str
    date: str
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> tuple[str, ...]:
        """The sizes, in order; a frontier is that of one size."""
        return tuple(dict.fromkeys(point.shape for point in self.points))

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        plain = asdict(self)
        return {
            "kind": "sweep",
            "schema": SCHEMA,
            **plain,
            "folder": str(self.folder),
            "work": str(self.work),
        }
