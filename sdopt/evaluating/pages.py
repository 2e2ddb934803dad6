"""The page of an evaluation: scores by stage and category, images of one seed side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdopt.drawing.charts import axis, bars, points
from sdopt.drawing.page import Page
from sdopt.evaluating.figures import Mean
from sdopt.evaluating.gallery import IMAGES
from sdopt.evaluating.results import Evaluation, StageResult

HEADS = ("stage", "images", "score", "best of each prompt", "to the first", "ratio", "s/image")


def rows(evaluation: Evaluation) -> list[list[str]]:
    """The table of stages, as texts under ``HEADS``."""
    first = evaluation.stages[0]
    return [_row(one, first) for one in evaluation.stages]


def page(evaluation: Evaluation) -> Page:
    """The page, its images included.

    Raises:
        MissingDependencyError: jinja2 or vl-convert-python is not installed, when it is written.
    """
    settings = ", ".join(f"{k} {v}" for k, v in evaluation.settings.items() if v not in (None, ""))
    made = Page(
        "Evaluation",
        f"{evaluation.bundle}: {len(evaluation.prompts)} prompts, "
        f"{evaluation.images_per_prompt} image(s) of each by every stage, from the same seeds.",
        settings,
        f"Score: {evaluation.scorer} ({evaluation.scorer_digest})."
        if evaluation.scorer
        else "Nothing was scored.",
    )
    made.section("Stages")
    made.table(
        HEADS,
        rows(evaluation),
        "Means over prompts, ± the standard error over prompts. Seconds are those of drawing, "
        "whatever else ran.",
    )
    scored = [one for one in evaluation.stages if one.score is not None]
    if any(one.seconds is not None for one in scored):
        made.chart(_against_seconds(scored))
    if scored:
        made.section("Categories")
        made.chart(_by_category(scored))
        _categories(made, scored)
    made.section("Images")
    for prompt in evaluation.sample():
        made.heading(f"{prompt.text} ({prompt.category})")
        made.images(
            [_image(evaluation, one, f"{prompt.index}_0.png") for one in evaluation.stages]
        )
    return made


def _row(one: StageResult, first: StageResult) -> list[str]:
    seconds = "-" if one.seconds is None else f"{one.seconds:.3f}"
    if one.score is None or first.score is None:
        return [one.stage, str(one.images), "-", "-", "-", "-", seconds]
    base = first.score.score.mean
    ratio = f"{one.score.score.mean / base:.4f}" if base else "-"
    return [
        one.stage,
        str(one.images),
        str(one.score.score),
        str(one.score.best),
        _signed(one.difference),
        ratio,
        seconds,
    ]


def _signed(one: Mean | None) -> str:
    return "-" if one is None else f"{'+' if one.mean >= 0 else ''}{one}"


def _against_seconds(scored: list[StageResult]) -> Any:
    return points(
        "Score against seconds",
        [
            {"stage": one.stage, "seconds": one.seconds, "score": one.score.score.mean}
            for one in scored
            if one.score is not None and one.seconds is not None
        ],
        axis("seconds", "seconds per image, as drawn"),
        axis("score", "score"),
        color=axis("stage", "stage", kind="nominal"),
        label="stage",
        tooltip=["stage", "seconds", "score"],
        texts="Higher and further left is better. For times to compare, see sdopt bench.",
    )


def _by_category(scored: list[StageResult]) -> Any:
    return bars(
        "Score by category",
        [
            {
                "stage": one.stage,
                "category": name,
                "score": found.score.mean,
                "best": found.best.mean,
                "prompts": found.prompts,
            }
            for one in scored
            for name, found in one.categories.items()
        ],
        axis("category", "", kind="nominal"),
        axis("score", "score"),
        color=axis("stage", "stage", kind="nominal"),
        tooltip=["stage", "category", "score", "best", "prompts"],
    )


def _categories(made: Page, scored: list[StageResult]) -> None:
    names = list(scored[0].categories)
    made.table(
        ["category", "prompts", *(one.stage for one in scored)],
        [
            [
                name,
                str(scored[0].categories[name].prompts),
                *(str(one.categories[name].score) for one in scored),
            ]
            for name in names
        ],
    )


def _image(evaluation: Evaluation, one: StageResult, name: str) -> tuple[str, Any]:
    from PIL import Image

    with Image.open(Path(evaluation.folder) / one.stage / IMAGES / name) as image:
        shown = image.convert("RGB")
    score = one.scores.get(name)
    return one.stage + ("" if score is None else f": {score:.4f}"), shown
