"""``build``: artifacts for one or several targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import BundleArgument, Components, DryRun, Force, Json
from sdopt.errors import UsageError

DTYPES = ("fp32", "fp16", "bf16", "int8", "fp8")


def build(
    bundle: BundleArgument = Path(),
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="e.g. ort, trt:dtype=fp16; repeatable.  [default: ort]"
        ),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Short for ort:provider=...: cpu or cuda.")
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Short for TARGET:dtype=fp32.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Short for TARGET:dtype=fp16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Short for TARGET:dtype=bf16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Short for TARGET:dtype=int8.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Short for TARGET:dtype=fp8.")] = False,
    tpu_python: Annotated[
        str, typer.Option(help="Short for tpu:python=PATH.  [default: $SDOPT_TPU_PYTHON]")
    ] = "",
    name: Annotated[
        str | None,
        typer.Option(help="Short for TARGET:stage=NAME: builds of one target side by side."),
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(help="HEIGHTxWIDTH in pixels: 512x512,768x768 or 256x256..1024x1024."),
    ] = "",
    batch: Annotated[str, typer.Option(help="Images at once: 1, or 1..4.")] = "1",
    dim: Annotated[
        list[str] | None, typer.Option(help="NAME=LOW..HIGH of another dynamic axis; repeatable.")
    ] = None,
    component: Components = None,
    source: Annotated[
        str | None, typer.Option("--from", help="The stage to lower; the optimized one if any.")
    ] = None,
    emit_only: Annotated[
        bool,
        typer.Option("--emit-only", help="Write the lowered graphs and the compiler's commands."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only see whether the target takes the graphs.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Lower the graphs for targets, compile them there, and prove that the artifacts open."""
    from sdopt import api
    from sdopt.shapes import parse_batch, parse_dim

    chosen = [name for name, on in zip(DTYPES, (fp32, fp16, bf16, int8, fp8), strict=True) if on]
    if len(chosen) > 1:
        raise UsageError(f"one type at a time: --{' --'.join(chosen)}", hint=f"--{chosen[0]}")
    if name is not None and len(target or []) > 1:
        raise UsageError("--name is of one target", hint="-t TARGET:stage=A -t OTHER:stage=B")
    extra = [*(f"provider={provider}" for _ in [0] if provider), *(f"dtype={d}" for d in chosen)]
    extra += [f'stage="{name}"'] * (name is not None)
    named = [f'python="{tpu_python}"'] * bool(tpu_python)
    targets = [
        ":".join([text, *extra, *(named if text.split(":")[0] == "tpu" else [])])
        for text in target or ["ort"]
    ]
    with render.progress("build") as tell:
        report = api.build(
            bundle,
            targets,
            components=component,
            source=source,
            shapes=shapes,
            batch=parse_batch(batch),
            dims=dict(map(parse_dim, dim or [])),
            emit_only=emit_only,
            check=check,
            force=force,
            dry_run=dry_run,
            progress=tell,
        )
    render.report(report, as_json)
