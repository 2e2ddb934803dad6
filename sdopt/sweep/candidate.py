"""One point of a sweep before it is measured: a recipe on a target, at a size and a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """What is tried.

    Attributes:
        recipe: passes in canonical spelling; empty for the raw graph.
        target: a target's spec, canonical too.
        shape: HEIGHTxWIDTH in pixels.
        batch: images computed together.
        choices: by the option's name what was chosen for it (``{"tome": "3", "target": "ort"}``);
            decides nothing, the other four do.
    """

    recipe: str
    target: str
    shape: str
    batch: int
    choices: Mapping[str, str] = field(default_factory=dict, compare=False, hash=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "choices": dict(self.choices)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """What ``to_json`` gave."""
        return cls(**data)
