"""``eval``: images of many prompts by several stages, scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import BundleArgument, Json, Target

if TYPE_CHECKING:
    from sdopt.evaluating import Evaluation


def evaluate(
    bundle: BundleArgument = Path(),
    prompts: Annotated[
        Path,
        typer.Option(help="PartiPrompts' FILE.tsv (Prompt, Category, ...), or a prompt a line."),
    ] = ...,  # type: ignore[assignment]
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder of images and scores.")
    ] = Path("evaluation"),
    clip: Annotated[
        Path | None,
        typer.Option(help="A folder of CLIP, transformers' or OpenCLIP's, to score with."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION or MODULE:FUNCTION, (images, prompts) to scores."),
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt.", min=1)] = 1,
    categories: Annotated[
        str | None, typer.Option(help="Only prompts of these categories: A,B.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many prompts.", min=1)
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="A stage to draw with, repeatable; the built or optimized one if any."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 or less turns it off.")] = 7.5,
    seed: Annotated[int, typer.Option(help="What every image's own seed is counted from.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++, ...; the bundle's by default.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    batch: Annotated[int, typer.Option(help="Images computed together.", min=1)] = 1,
    target: Target = "ort",
    device: Annotated[
        str | None, typer.Option(help="0,1: a process on each, which share the images.")
    ] = None,
    workers: Annotated[int, typer.Option(help="So many processes, without --device.", min=1)] = 1,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts and images.")] = None,
    as_json: Json = False,
) -> None:
    """Draw many prompts and score the images, by one or more stages; a killed run goes on."""
    from sdopt import api

    with render.progress("eval") as tell:
        made = api.evaluate(
            bundle,
            prompts,
            output,
            stages=stage or (),
            clip=clip,
            scorer=scorer,
            images_per_prompt=images_per_prompt,
            categories=[one.strip() for one in (categories or "").split(",") if one.strip()],
            limit=limit,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            scheduler=scheduler,
            width=width,
            height=height,
            batch=batch,
            target=target,
            device=device,
            workers=workers,
            progress=tell,
        )
    from sdopt.evaluating import pages

    if html is not None:
        pages.page(made).write(html)
    if as_json:
        render.dump(made.to_json())
        return
    _say(made)
    render.result(str(made.folder))


def _say(made: Evaluation) -> None:
    """The tables of stages and of categories."""
    from sdopt.evaluating import pages

    render.say(
        f"eval: {len(made.prompts)} prompts, {made.images_per_prompt} image(s) of each"
        + (f", {made.scorer}" if made.scorer else ", not scored (--clip DIR or --scorer)")
    )
    render.table([list(pages.HEADS), *pages.rows(made)])
    scored = [one for one in made.stages if one.score is not None]
    if scored and len(scored[0].categories) > 1:
        heads = ["category", "prompts", *(one.stage for one in scored)]
        rows = [
            [
                name,
                str(found.prompts),
                *(str(one.categories[name].score) for one in scored),
            ]
            for name, found in scored[0].categories.items()
        ]
        render.table([heads, *rows])
