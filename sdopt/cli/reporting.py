"""``report``: one page about a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import BundleArgument, Components
from sdopt.units import seconds, size


def report(
    bundle: BundleArgument = Path(),
    output: Annotated[Path, typer.Option("-o", "--output", help="The page's file.")] = Path(
        "report.html"
    ),
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Show, compare and draw with this stage; repeatable; all by default."),
    ] = None,
    component: Components = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 8,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 or less turns it off.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the inputs and of the first image.")] = 0,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Draw the prompts with every stage.")
    ] = True,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare every stage with the raw one.")
    ] = True,
    bench: Annotated[
        Path | None, typer.Option(help="Show this JSON file of sdopt bench, too.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Show this folder of sdopt eval, too.")
    ] = None,
) -> None:
    """Write one HTML page: lineage, what each pass did, time and memory, numbers, images."""
    from sdopt import api
    from sdopt.reporting import Options
    from sdopt.reporting.samples import PROMPTS, Drawing

    drawing = Drawing(tuple(prompt or PROMPTS), steps, guidance, seed)
    options = Options(component, stage, compare, images, drawing, bench, evaluation)
    with render.progress("report") as tell:
        made = api.report(bundle, output, options, progress=tell)
    for note in made.notes:
        render.say(f"note: not computed here: {note}")
    render.say(f"report: {size(made.size_bytes)} in {seconds(made.seconds)}")
    render.result(str(made.file))
