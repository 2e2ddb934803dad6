"""``precision``: what must stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import BundleArgument, Json, one_size_each


def precision(
    bundle: BundleArgument = Path(),
    component: Annotated[
        str, typer.Option("--component", "-c", help="Which one: unet, transformer, vae_decoder.")
    ] = "unet",
    dtype: Annotated[str, typer.Option(help="fp16 or bf16.")] = "fp16",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative L2 from float32 that is allowed; compare's by default."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="The float32 stage; the optimized one by default.")
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="A folder that record wrote: real inputs, not seeded ones.")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many, evenly over the timesteps.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of seeded inputs.")] = 0,
    dim: Annotated[
        list[str] | None, typer.Option(help="NAME=SIZE of a dynamic axis; repeatable.")
    ] = None,
    io: Annotated[
        bool, typer.Option("--io/--no-io", help="Whether inputs and outputs stay in float32.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The recipe; BUNDLE/recipes/... by default."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="A page with the ranges and every trial.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fewest modules that must stay in float32; exit code 1 if none are enough."""
    from sdopt import api

    with render.progress("precision") as tell:
        found = api.precision(
            bundle,
            component,
            dtype=dtype,
            tolerance=tolerance,
            stage=stage,
            recording=recorded,
            samples=samples,
            seed=seed,
            sizes=one_size_each(dim or [], "precision"),
            io=io,
            output=output,
            progress=tell,
        )
    if html is not None:
        found.page().write(html)
        render.say(f"page: {html}")
    if as_json:
        render.dump(found.to_json())
    else:
        for line in found.lines():
            render.result(line)
    if not found.passed:
        raise typer.Exit(1)
