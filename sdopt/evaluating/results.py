"""What an evaluation found, as it is in evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdopt.evaluating.figures import Figures, Mean
from sdopt.evaluating.prompts import Prompt

RESULT = "evaluation.json"
SAMPLES = 6
"""Prompts whose images a page shows; evenly from all."""

_SCHEMA = 1


@dataclass(frozen=True)
class StageResult:
    """What one stage drew.

    Attributes:
        stage: its name; the folder of the evaluation that its images are in is called so.
        stages: the stage that ran of each component.
        bundle: the digest of these, weights included.
        images: how many.
        seconds: of one image, as it was drawn, in the mean; None if no time was kept.
        scores: of each image by its file's name, from 0_0.png (prompt, image); empty if none.
        score: over all prompts.
        categories: by category.
        difference: how much higher the score is than the first stage's, paired by prompt; None
            for the first.
    """

    stage: str
    stages: Mapping[str, str]
    bundle: str
    images: int
    seconds: float | None
    scores: Mapping[str, float]
    score: Figures | None
    categories: Mapping[str, Figures]
    difference: Mean | None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        folder: where everything is: ``evaluation.json``, and a folder per stage with ``images``,
            ``image_info.json`` and ``scores``.
        bundle: the path of the bundle.
        prompts: what was drawn.
        images_per_prompt: how many of each.
        settings: that decided the images.
        scorer: its name, "" without one.
        scorer_digest: of what decides its scores.
        stages: as they were asked for.
    """

    folder: Path
    bundle: Path
    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    settings: Mapping[str, Any]
    scorer: str
    scorer_digest: str
    stages: tuple[StageResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it is in evaluation.json."""
        plain = {**asdict(self), "folder": str(self.folder), "bundle": str(self.bundle)}
        return {"schema": _SCHEMA, **plain}

    def sample(self) -> list[Prompt]:
        """A few prompts, evenly from all of them."""
        count = min(SAMPLES, len(self.prompts))
        return [self.prompts[i * len(self.prompts) // count] for i in range(count)]
