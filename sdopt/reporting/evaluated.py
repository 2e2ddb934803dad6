"""The section of an evaluation: scores that ``sdopt eval`` left in a folder, and its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bundle import Bundle
from sdopt.drawing.charts import axis, bars
from sdopt.drawing.page import Cell, Page
from sdopt.errors import UsageError
from sdopt.manifest import read_object
from sdopt.runtime.session import digest_of

if TYPE_CHECKING:
    from PIL.Image import Image

RESULT = "evaluation.json"
SHOWN = 4
"""Prompts whose images are shown, evenly from all."""

_HOW = "make one: sdopt eval BUNDLE --prompts FILE -o FOLDER"


@dataclass(frozen=True)
class Scored:
    """What one stage drew and how that was scored.

    Attributes:
        stage: its name.
        stages: the stage that ran of each component.
        digest: of these, as they were.
        images: how many.
        score: mean and standard error over all prompts; None without a scorer.
        categories: the mean of each category.
    """

    stage: str
    stages: Mapping[str, str]
    digest: str
    images: int
    score: tuple[float, float | None] | None
    categories: Mapping[str, float]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on disk: its folder, scorer, stages, and the prompts by their index."""

    folder: Path
    scorer: str
    stages: tuple[Scored, ...]
    prompts: Mapping[int, str]


def read(folder: Path) -> Evaluated:
    """What an evaluation left in its folder.

    Raises:
        UsageError: there is none, or it cannot be read.
        BundleError: it was written by a newer sdopt.
    """
    path = folder / RESULT
    if not path.is_file():
        raise UsageError("there is no evaluation here", where=str(folder), hint=_HOW)
    data = read_object(path.read_text("utf-8", "replace"), str(path))
    try:
        prompts = {int(one["index"]): str(one["text"]) for one in data["prompts"]}
        stages = tuple(map(_scored, data["stages"]))
        return Evaluated(folder, str(data["scorer"]), stages, prompts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            "this evaluation cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint=_HOW,
        ) from error


def _scored(data: Mapping[str, Any]) -> Scored:
    stage, score = str(data["stage"]), data["score"]
    if Path(stage).name != stage:
        raise ValueError(f"{stage!r} is no name for a stage")
    error = score["score"]["error"] if score else None
    return Scored(
        stage,
        {str(name): str(one) for name, one in data["stages"].items()},
        str(data["bundle"]),
        int(data["images"]),
        (float(score["score"]["mean"]), None if error is None else float(error))
        if score
        else None,
        {str(n): float(one["score"]["mean"]) for n, one in data["categories"].items()},
    )


def evaluation(page: Page, bundle: Bundle, one: Evaluated) -> None:
    """Scores by stage and category, and images of the same prompts and seeds."""
    page.section("Evaluation")
    page.text(
        f"{len(one.prompts)} prompts, from {RESULT}. "
        + (
            f"Scored by {one.scorer}; the error is that of the mean over prompts."
            * bool(one.scorer)
        )
    )
    page.table(
        ["stage", "images", "score", "standard error", "state"],
        [[each.stage, each.images, *_score(each), _state(bundle, each)] for each in one.stages],
    )
    rows = [
        {"stage": each.stage, "category": name, "score": score}
        for each in one.stages
        for name, score in each.categories.items()
    ]
    if rows:
        page.chart(
            bars(
                "Score by category",
                rows,
                axis("category", "", kind="nominal"),
                axis("score", "score"),
                color=axis("stage", "", kind="nominal"),
                tooltip=["stage", "category", "score"],
                texts="Mean over the prompts of each category.",
            )
        )
    indices = sorted(one.prompts)
    count = min(SHOWN, len(indices))
    for index in (indices[number * len(indices) // count] for number in range(count)):
        if found := list(_images(one, index)):
            page.heading(one.prompts[index])
            page.images(found)


def _score(one: Scored) -> list[object]:
    if one.score is None:
        return ["not scored", ""]
    mean, error = one.score
    return [f"{mean:.4f}", "one prompt" if error is None else f"{error:.4f}"]


def _state(bundle: Bundle, one: Scored) -> Cell:
    """Whether the stages in the bundle are those that drew."""
    there = {
        name: bundle.stage(name, stage)
        for name, stage in one.stages.items()
        if name in bundle.components and stage in bundle.stages(name)
    }
    if there.keys() == one.stages.keys() and digest_of(there) == one.digest:
        return Cell("of the stages as they are")
    return Cell("STALE: of other stages than the bundle holds now", "bad")


def _images(one: Evaluated, index: int) -> Iterator[tuple[str, Image]]:
    from PIL.Image import open as open_image

    for each in one.stages:
        path = one.folder / each.stage / "images" / f"{index}_0.png"
        if path.is_file():
            with open_image(path) as image:
                yield each.stage, image.convert("RGB")
