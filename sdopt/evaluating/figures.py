"""What many scores come to: means over prompts, each with its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scores = Mapping[int, Sequence[float]]
"""By the prompt's index, one score per image."""


@dataclass(frozen=True)
class Mean:
    """A mean over prompts.

    Attributes:
        mean: of the prompts' values.
        error: its standard error, the prompts taken for a sample; None of a single prompt.
    """

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Figures:
    """The scores of some prompts.

    Attributes:
        prompts: how many.
        images: how many.
        score: of all images: each prompt counts by the mean of its images.
        best: each prompt counts by the best of its images.
    """

    prompts: int
    images: int
    score: Mean
    best: Mean


def mean(values: Sequence[float]) -> Mean:
    """The mean of one value per prompt."""
    many = len(values) > 1
    error = statistics.stdev(values) / math.sqrt(len(values)) if many else None
    return Mean(statistics.fmean(values), error)


def figures(scores: Scores) -> Figures:
    """What the scores of some prompts come to; there is at least one."""
    return Figures(
        prompts=len(scores),
        images=sum(map(len, scores.values())),
        score=mean([statistics.fmean(one) for one in scores.values()]),
        best=mean([max(one) for one in scores.values()]),
    )


def difference(scores: Scores, others: Scores) -> Mean:
    """How much higher ``scores`` are, prompt by prompt, so that what these share cancels out."""
    return mean([statistics.fmean(scores[i]) - statistics.fmean(others[i]) for i in scores])
