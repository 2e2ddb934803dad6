"""``export``, ``adopt``, ``optimize`` and ``pack``: the verbs that write bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.cli.options import (
    BundleArgument,
    Components,
    DryRun,
    Force,
    Json,
    ModelArgument,
)
from sdopt.errors import UsageError


def export(
    source: Annotated[
        str, typer.Argument(help="A diffusers folder, FILE.safetensors, or a Hub id.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The bundle.")] = None,
    component: Components = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; the checkpoint's by default.")
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Write the graphs beside the checkpoint; copy nothing."),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(help="Also as plain ONNX of this opset, 11 to 25: as build -t onnx:opset=N."),
    ] = None,
    controlnet: Annotated[
        str | None,
        typer.Option(help="A ControlNet to put before the UNet: a folder, a file or a Hub id."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:scale of an adapter; repeatable.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Its folder, where the source lacks it or to replace it.")
    ] = None,
    text_encoder_2: Annotated[
        Path | None, typer.Option(help="The same of XL's second one.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="The same of the VAE.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The same of the tokenizer.")] = None,
    as_json: Json = False,
) -> None:
    """Export a model to a bundle of canonical ONNX graphs; no weight passes through memory."""
    from sdopt import api

    supplied: dict[str, str | Path | None] = {
        "controlnet": controlnet,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "vae": vae,
        "tokenizer": tokenizer,
    }
    with render.progress("export") as tell:
        report = api.export(
            source,
            output,
            components=component,
            dtype=dtype,
            in_place=in_place,
            opset=opset,
            supplied={part: folder for part, folder in supplied.items() if folder is not None},
            lora=lora or (),
            progress=tell,
        )
    render.report(report, as_json)


def adopt(
    file: Annotated[Path, typer.Argument(help="FILE.onnx, of opset 9 to 25.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The bundle; a folder of the file's name by default."),
    ] = None,
    component: Annotated[
        str, typer.Option("--component", "-c", help="What to call it in the bundle.")
    ] = "model",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take in an ONNX file of anyone's as a bundle; no weight passes through memory."""
    from sdopt import api

    with render.progress("adopt") as tell:
        report = api.adopt(file, output, component=component, force=force, progress=tell)
    render.report(report, as_json)


def optimize(
    bundle: ModelArgument = Path(),
    passes: Annotated[
        str, typer.Option("--passes", "-p", help="e.g. fuse_qkv,tome=5,@fast, or FILE.recipe")
    ] = "@fast",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to, for one FILE.onnx.")
    ] = None,
    component: Components = None,
    source: Annotated[str, typer.Option("--from", help="The stage to start from.")] = "model",
    stage: Annotated[str, typer.Option(help="The stage to write.")] = "optimized",
    seed: Annotated[int, typer.Option(help="Of passes that draw.")] = 0,
    require: Annotated[
        str | None,
        typer.Option(help="attention=all,geglu=16: write nothing and exit 1 if not met."),
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rewrite the graphs with passes; the result is a stage beside the one it came from."""
    from sdopt import api
    from sdopt.requirements import enforce

    single = bundle.suffix == ".onnx"
    if single and output is None:
        raise UsageError("where to?", hint=f"sdopt optimize {bundle} -o OUT.onnx --passes ...")
    if not single and output is not None:
        raise UsageError(
            "-o is for one FILE.onnx", hint="a bundle's result is a stage: --stage NAME"
        )
    with render.progress("optimize") as tell:
        if single and output is not None:
            report = api.optimize_file(
                bundle,
                output,
                passes,
                seed=seed,
                require=require,
                dry_run=dry_run,
                progress=tell,
            )
        else:
            report = api.optimize(
                bundle,
                passes,
                components=component,
                source=source,
                stage=stage,
                seed=seed,
                require=require,
                force=force,
                dry_run=dry_run,
                progress=tell,
            )
    render.report(report, as_json)
    enforce(report)


def pack(
    bundle: BundleArgument = Path(),
    output: Annotated[Path, typer.Option("-o", "--output", help="The copy's folder.")] = ...,  # type: ignore[assignment]
    component: Components = None,
    stage: Annotated[
        str | None, typer.Option(help="The stage to pack; the optimized one if any.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a self-contained copy: one stage of each component and exactly its weights."""
    from sdopt import api

    with render.progress("pack") as tell:
        report = api.pack(bundle, output, components=component, stage=stage, progress=tell)
    render.report(report, as_json)
