"""``sweep``: recipes, targets and sizes tried, and the one to use."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sdopt.cli import render
from sdopt.cli.options import Json
from sdopt.errors import UsageError

if TYPE_CHECKING:
    from sdopt.sweep.result import Point, Result

RUN = "run"


class BundleFirst(TyperGroup):
    """``sdopt sweep BUNDLE`` is ``sdopt sweep run BUNDLE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the word in where it is left out."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=BundleFirst,
    help="Try recipes, targets and sizes; the frontier, and the recipe to use of it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(help="The folder of a sweep.")]


@app.command(RUN)
def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    file: Annotated[
        Path | None, typer.Argument(help="FILE.toml with any of these options by name.")
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe; tome=0..5 is each, cast_fp16|quantize=w8 either; repeatable. "
            "[default: @fast]"
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="A target, likewise; repeatable.  [default: ort]"),
    ] = None,
    shapes: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels: A,B.")] = None,
    batch: Annotated[str | None, typer.Option(help="Images at once: 1,2,4.  [default: 1]")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="PartiPrompts' FILE.tsv, or a prompt a line.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, in place of a file; repeatable.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many prompts.", min=1)
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Each draws each prompt: 0,1 or 0..3.  [default: 0]")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION or MODULE:FUNCTION, (images, prompts) to scores."),
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="A folder of CLIP to score with.")] = None,
    distance: Annotated[
        bool, typer.Option("--distance", help="Score by likeness to the raw graph's images.")
    ] = False,
    measure: Annotated[
        str | None, typer.Option(help="Which axes.  [default: time,memory,score]")
    ] = None,
    probe: Annotated[
        int | None,
        typer.Option(
            help="Give up what is worse on every axis after so many prompts; 0 never.  "
            "[default: 4]"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: 25]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: 7.5]")] = None,
    scheduler: Annotated[str | None, typer.Option(help="The bundle's by default.")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed batches of whole images.  [default: 5]")
    ] = None,
    pause: Annotated[
        float | None, typer.Option(help="Seconds of rest before each.  [default: 0.1]")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="grid, random, tpe or nsgaii.  [default: grid]")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Points that the sampler may try.")] = None,
    sampler_seed: Annotated[int | None, typer.Option(help="Of the sampler.  [default: 0]")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes here; 0: this one.  [default: 0]", min=0)
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="auto, or the ADDRESS of a Ray cluster to run on.")
    ] = None,
    allow_other_versions: Annotated[
        bool,
        typer.Option("--allow-other-versions", help="Take nodes with other versions of packages."),
    ] = False,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder; a killed sweep goes on in it.")
    ] = Path("sweep"),
    html: Annotated[Path | None, typer.Option(help="Write a page with charts and images.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the frontier as a PNG, one for each size.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write the points as Parquet.")] = None,
    as_json: Json = False,
) -> None:
    """Try recipes on targets and sizes, and show the frontier of time, memory and quality."""
    from sdopt import api

    if prompts is not None and prompt:
        raise UsageError("either a file of prompts, or prompts", hint="--prompts, or --prompt")
    given: dict[str, Any] = {
        "passes": passes or None,
        "target": target or None,
        "shapes": shapes,
        "batch": _numbers(batch, "--batch"),
        "prompts": str(prompts) if prompts is not None else prompt or None,
        "limit": limit,
        "seeds": _numbers(seeds, "--seeds"),
        "scorer": scorer,
        "clip": str(clip) if clip is not None else None,
        "distance": distance or None,
        "measure": [one.strip() for one in measure.split(",")] if measure else None,
        "probe": probe,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "negative": negative,
        "rounds": rounds,
        "pause": pause,
        "sampler": sampler,
        "budget": budget,
        "sampler_seed": sampler_seed,
        "workers": workers,
        "ray": ray,
        "allow_other_versions": allow_other_versions or None,
    }
    command = shlex.join(["sdopt", *sys.argv[1:]])
    # Ray prints what happens to its nodes, and stdout is for the result.
    with render.progress("sweep") as tell, contextlib.redirect_stdout(sys.stderr):
        result = api.sweep(bundle, output, file, command=command, progress=tell, **given)
    _show(result, html, plot, parquet, as_json)


@app.command("best")
def best(
    folder: Folder,
    max_ms: Annotated[float | None, typer.Option(help="Milliseconds per image at most.")] = None,
    max_gb: Annotated[float | None, typer.Option(help="GB of memory at most.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Score at least.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="The size, where the sweep has several.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Only this target.")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Optimize and build the bundle by it.")
    ] = False,
    name: Annotated[str, typer.Option(help="What --apply calls the build.")] = "best",
    as_json: Json = False,
) -> None:
    """Print the recipe to use: the fastest with --min-score, else the best within the limits."""
    from sdopt.sweep import applying, frontier, report

    result = report.load(folder)
    point = frontier.best(
        result, max_ms=max_ms, max_gb=max_gb, min_score=min_score, shape=shapes, target=target
    )
    _say(result, point)
    if apply:
        with render.progress("apply") as tell:
            applied = applying.apply(result.bundle, point, name, tell)
        render.say(f"built as {name}: sdopt run {result.bundle} --stage {name}")
        for one in applied:
            render.say(f"{one.verb}: {len(one.components)} component(s) in {one.seconds:.1f} s")
    if as_json:
        render.dump(next(p for p in result.to_json()["points"] if p["key"] == point.key))
        return
    render.result(point.recipe)


@app.command("show")
def show(
    folder: Folder,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts and images.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the frontier as a PNG, one for each size.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write the points as Parquet.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a sweep has found so far, also while it runs; nothing is measured."""
    from sdopt.sweep import report

    _show(report.load(folder), html, plot, parquet, as_json)


def _show(
    result: Result, html: Path | None, plot: Path | None, parquet: Path | None, as_json: bool
) -> None:
    from sdopt.sweep import page, report

    if html is not None:
        page.page(result).write(html)
        render.say(f"the page is {html}")
    if plot is not None:
        for path in page.plot(result, plot):
            render.say(f"the plot is {path}")
    if parquet is not None:
        report.export(result, parquet)
    if as_json:
        render.dump(result.to_json())
        return
    render.say(f"sweep: {len(result.points)} points of {result.bundle}, * on the frontier")
    render.table(report.table(result))
    for note in result.notes:
        render.say(f"note: {note}")
    render.result(str(result.folder))


def _say(result: Result, point: Point) -> None:
    """What the point costs, and how it was come to."""
    parts = [f"{point.name} on {point.target}, {point.shape}, batch {point.batch}"]
    if point.ms is not None:
        parts.append(f"{point.ms:.1f} ms per image")
    if point.memory_bytes is not None:
        parts.append(f"{point.memory_bytes / 1e9:.2f} GB")
    if point.score is not None:
        parts.append(f"score {point.score:.4f}")
    render.say("; ".join(parts))
    render.say(f"measured by: {point.command}")


def _numbers(text: str | None, option: str) -> list[int] | None:
    """``0,2..4`` as numbers.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        low, dots, high = part.strip().partition("..")
        if not low.isdecimal() or (dots and not high.isdecimal()):
            raise UsageError(f"{part!r} is no number", hint=f"{option} 0,1 or 0..3")
        found += range(int(low), int(high or low) + 1)
    return found
