"""``run`` and ``record``: images from prompts, by the graphs of a bundle."""

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
    strength: Annotated[
        float | None, typer.Option(help="How far to leave --image, 0 to 1; 0.8, or 1 for a mask.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Draw --image anew where this is white.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="The ControlNet's hint image: edges, depth, a pose.")
    ] = None,
    control_scale: Annotated[float, typer.Option(help="How much --control counts.")] = 1.0,
    stage: Annotated[
        str | None, typer.Option(help="The stage; the built or optimized one if any.")
    ] = None,
    target: Target = "ort",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="An adapter, FILE or FILE:scale, for this run only; repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="1, or 0,1: each computes one half of guidance's batch.")
    ] = None,
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
            mask=mask,
            control=control,
            control_scale=control_scale,
            stage=stage,
            target=target,
            device=device,
            loras=lora or (),
            progress=tell,
        )
        for index, one in enumerate(made):
            path = output / f"{index:04d}.png"
            save_png(one, path)
            render.result(str(path))


def record(
    bundle: Annotated[
        Path, typer.Argument(help="The bundle; the current folder by default.")
    ] = Path(),
    prompts: Annotated[Path, typer.Option(help="A file with one prompt a line.")] = ...,  # type: ignore[assignment]
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    keep: Annotated[int, typer.Option(help="Steps to keep per prompt, evenly.", min=1)] = 8,
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 or less turns it off.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next takes the next.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++, ...; the bundle's by default.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="The stage; the built or optimized one if any.")
    ] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="What runs it.")] = "ort",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The folder; BUNDLE/recorded/default by default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Record although it is there.")] = False,
) -> None:
    """Draw the prompts and keep what each component was given, to calibrate quantize with."""
    from sdopt import api

    with render.progress("record") as tell:
        made = api.record(
            bundle,
            _lines(prompts),
            output=output,
            keep=keep,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            scheduler=scheduler,
            width=width,
            height=height,
            stage=stage,
            target=target,
            force=force,
            progress=tell,
        )
    counts = ", ".join(f"{count} of {name}" for name, count in made.counts().items())
    render.say(f"record: {counts}")
    render.result(str(made.folder))


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError("the prompts cannot be read", where=str(path), why=str(error)) from error
    return [line.strip() for line in lines if line.strip()]
