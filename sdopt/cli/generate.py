"""``run``: images from prompts, by the graphs of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import BundleArgument, Target
from sdopt.errors import UsageError


def run(
    bundle: BundleArgument = Path(),
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 or less turns it off.")] = 7.5,
    seed: Annotated[
        int, typer.Option(help="Of the first image; each next one takes the next.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++, ...; the bundle's by default.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    count: Annotated[int, typer.Option(help="Images per prompt.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Images computed together.", min=1)] = 1,
    image: Annotated[Path | None, typer.Option(help="Start from this image.")] = None,
    strength: Annotated[float, typer.Option(help="How far to leave --image, 0 to 1.")] = 0.8,
    stage: Annotated[
        str | None, typer.Option(help="The stage; the built or optimized one if any.")
    ] = None,
    target: Target = "ort",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the PNGs.")] = Path(
        "images"
    ),
) -> None:
    """Make images: PNG files that carry prompt, seed, steps and the bundle's digest."""
    texts = [*(prompt or []), *_lines(prompts)]
    if not texts:
        raise UsageError("what to draw?", hint='--prompt "..." or --prompts FILE')
    from sdopt import api
    from sdopt.runtime.generate import save_png

    output.mkdir(parents=True, exist_ok=True)
    with render.progress("run") as tell:
        made = api.run(
            bundle,
            texts,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            scheduler=scheduler,
            width=width,
            height=height,
            count=count,
            batch=batch,
            image=image,
            strength=strength,
            stage=stage,
            target=target,
            progress=tell,
        )
        for index, one in enumerate(made):
            path = output / f"{index:04d}.png"
            save_png(one, path)
            render.result(str(path))


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError("the prompts cannot be read", where=str(path), why=str(error)) from error
    return [line.strip() for line in lines if line.strip()]
