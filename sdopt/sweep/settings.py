"""What all points of a sweep have in common: what is drawn, how it is scored and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdopt import spec
from sdopt.errors import UnknownNameError, UsageError
from sdopt.sweep.scoring import DISTANCE, scorer_of

MEASURES = {"time": "ms", "memory": "memory_bytes", "score": "score"}
"""What ``--measure`` names to the axis of the frontier."""


@dataclass(frozen=True)
class Scoring:
    """How good images are judged to be.

    Attributes:
        kind: ``clip``, ``function``, ``distance``; empty where nothing is scored.
        place: the folder of CLIP, or FILE.py:FUNCTION.
        name: for people.
        digest: of what decides the scores.
    """

    kind: str = ""
    place: str = ""
    name: str = ""
    digest: str = ""

    @classmethod
    def of(cls, clip: str | None, scorer: str | None, distance: bool) -> Scoring:
        """The one scorer that was asked for, loaded once to see that it is there.

        Raises:
            UsageError: several, or it cannot be loaded.
        """
        given = {"clip": clip, "function": scorer, DISTANCE: "raw" if distance else None}
        asked = {kind: place for kind, place in given.items() if place}
        if len(asked) > 1:
            raise UsageError(
                "one scorer at a time", hint="--scorer FILE.py:FUNCTION, --clip DIR or --distance"
            )
        for kind, place in asked.items():
            if kind == DISTANCE:
                return cls(kind, "", "likeness to the raw graph's images", DISTANCE)
            file = Path(place if kind == "clip" else place.rpartition(":")[0])
            where = str(Path(place).absolute()) if file.exists() else place
            found = scorer_of(kind, where)
            assert found is not None  # of these two kinds
            return cls(kind, where, found.name, found.digest)
        return cls()


@dataclass(frozen=True)
class Settings:
    """The options of a sweep that decide what its points come to.

    Attributes:
        prompts: what is drawn and scored.
        seeds: image ``i`` of the prompts is drawn from each of them plus ``i``.
        scoring: see there.
        measure: of ``time``, ``memory``, ``score``.
        probe: prompts after which a point that is worse on every axis is given up; 0 never.
        steps: of denoising.
        guidance: scale.
        scheduler: a short name; the bundle's by default.
        negative: what not to draw.
        rounds: of whole images that are timed, each a batch.
        pause: seconds of rest before each round.
    """

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    scoring: Scoring = field(default_factory=Scoring)
    measure: tuple[str, ...] = tuple(MEASURES)
    probe: int = 4
    steps: int = 25
    guidance: float = 7.5
    scheduler: str | None = None
    negative: str = ""
    rounds: int = 5
    pause: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything runs."""
        for name in self.measure:
            if name not in MEASURES:
                raise UnknownNameError(
                    f"nothing is called {name!r} that could be measured",
                    hint=spec.suggest(name, MEASURES),
                )
        if not self.measure:
            raise UsageError("there is nothing to measure", hint="--measure time,memory,score")
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.probe < 0 or not 0 <= self.pause < float("inf"):
            raise UsageError("probe and pause must be 0 or more")
        if "score" not in self.measure:
            return
        if not self.scoring.kind:
            raise UsageError(
                "nothing says how good an image is",
                hint="--scorer FILE.py:FUNCTION, --clip DIR or --distance; "
                "or --measure time,memory",
            )
        if not self.prompts or not self.seeds:
            raise UsageError("no prompt to draw", hint="--prompts FILE, and --seeds 0,1")

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the frontier that are measured."""
        return tuple(axis for name, axis in MEASURES.items() if name in self.measure)

    @property
    def times(self) -> bool:
        """Whether points are given to ``bench``."""
        return bool({"time", "memory"} & {*self.measure})

    @property
    def probes(self) -> bool:
        """Whether points may be given up early: there is more than one axis to be worse on."""
        return (
            "score" in self.measure
            and len(self.measure) > 1
            and 0 < self.probe < len(self.prompts)
        )

    def drawing(self) -> dict[str, Any]:
        """What decides an image, but for prompt, seed and size."""
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "scheduler": self.scheduler,
            "negative": self.negative,
        }

    def bench(self) -> dict[str, Any]:
        """How a point is timed."""
        return {
            "rounds": self.rounds,
            "pause": self.pause,
            "memory": "memory" in self.measure,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}

    def deciding(self) -> dict[str, Any]:
        """``to_json`` without where the scorer lies: its digest decides."""
        plain = self.to_json()
        scoring = {name: v for name, v in plain["scoring"].items() if name != "place"}
        return {**plain, "scoring": scoring}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """What ``to_json`` or ``deciding`` gave."""
        lists = {name: tuple(data[name]) for name in ("prompts", "seeds", "measure")}
        return cls(**{**data, **lists, "scoring": Scoring(**data["scoring"])})
