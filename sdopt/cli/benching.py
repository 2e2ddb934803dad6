"""``bench``: latency, throughput and memory of stages and targets side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import BundleArgument, Components, Json
from sdopt.errors import UsageError


def bench(
    bundle: BundleArgument = Path(),
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable; ratios are to the first.  [default: raw, optimized, built]"
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="e.g. ort:threads=2; repeatable.  [default: ort]"),
    ] = None,
    component: Components = None,
    shapes: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels; the model's own.")] = "",
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 1,
    dim: Annotated[
        list[str] | None, typer.Option(help="NAME=SIZE of another dynamic axis; repeatable.")
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="Feed what sdopt record wrote to this folder.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count, per component.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before those.", min=1)] = 3,
    pause: Annotated[float, typer.Option(help="Seconds of rest before each turn.", min=0)] = 0.1,
    image: Annotated[
        bool | None,
        typer.Option(
            "--image/--no-image", help="Time whole images; by default where no -c is given."
        ),
    ] = None,
    image_rounds: Annotated[int, typer.Option(help="Images that count.", min=1)] = 5,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Run each row in its own process too.")
    ] = True,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Of the images; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of an image.", min=1)] = 25,
    guidance: Annotated[
        float, typer.Option(help="Guidance scale; 1 or less halves the denoiser's batch.")
    ] = 7.5,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++, ...; the bundle's by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs and the first image.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts.")] = None,
    as_json: Json = False,
) -> None:
    """Measure latency, throughput and memory of stages and targets, side by side in one run."""
    from sdopt import api
    from sdopt.bench import text
    from sdopt.drawing.charts import renderer
    from sdopt.shapes import parse_dim

    dims = {}
    for name, (low, high) in map(parse_dim, dim or []):
        if low != high:
            raise UsageError("bench takes one size of an axis", hint=f"--dim {name}={high}")
        dims[name] = high
    if html is not None:
        renderer()  # that it is missing is better said before than after the run
    with render.progress("bench") as tell:
        report = api.bench(
            bundle,
            stages=stage or (),
            targets=target or ["ort"],
            components=component,
            shapes=shapes,
            batch=batch,
            dims=dims,
            recorded=recorded,
            rounds=rounds,
            warm_up=warmup,
            pause=pause,
            images=image,
            image_rounds=image_rounds,
            memory=memory,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
            command=shlex.join(["sdopt", *sys.argv[1:]]),
            progress=tell,
            **({"prompts": prompt} if prompt else {}),
        )
    if html is not None:
        text.page(report).write(html)
        render.say(f"the page is {html}")
    if as_json:
        render.dump(report.to_json())
        return
    for line in text.lines(report):
        render.result(line)
