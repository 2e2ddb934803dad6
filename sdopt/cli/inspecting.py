"""``inspect``, ``compare``, ``passes`` and ``targets``: the verbs that only look."""

from __future__ import annotations

import inspect as pyinspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdopt.cli import render
from sdopt.cli.options import Components, Json, ModelArgument, one_size_each
from sdopt.units import size

if TYPE_CHECKING:
    from sdopt.compare import LayerComparison


def inspect(
    path: ModelArgument = Path(),
    component: Annotated[
        str | None, typer.Option("--component", "-c", help="Only this component.")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read them all; exit 1 if any is NaN or infinite.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show components, stages, passes applied, operators and sizes."""
    from sdopt import api

    data = api.inspect(path, component, weights=weights)
    if as_json:
        render.dump(data)
    elif "bundle" in data:
        render.result(f"{data['bundle']}: {data['family']} from {data['origin']}")
        for name, one in data["components"].items():
            render.result(f"{name} ({one['role']})")
            for stage in one["stages"]:
                _stage(stage)
    else:
        render.result(data["file"])
        _graph(data)
    stages = [s for c in data.get("components", {}).values() for s in c["stages"]] or [data]
    if any(one.get("nonfinite") for one in stages):
        raise typer.Exit(1)


def _stage(one: dict[str, Any]) -> None:
    history = ",".join(one["history"]) or "as exported"
    stale = " STALE: its source has changed since" if one["stale"] else ""
    render.result(f"  {one['name']:<12} {one['file']}  {one['digest']}  {one['dtype']}{stale}")
    render.result(f"    from {one['made_from']}: {history}")
    _graph(one)


def _graph(one: dict[str, Any]) -> None:
    for kind in ("inputs", "outputs"):
        for value in one[kind]:
            shape = ", ".join(map(str, value["shape"]))
            render.result(f"    {kind[:-1]:<6} {value['name']}: {value['dtype']} [{shape}]")
    top = ", ".join(f"{count} {name}" for name, count in list(one["ops"].items())[:8])
    weights = size(one["weight_bytes"])
    render.result(f"    opset {one['opset']}, {one['nodes']} nodes ({top}), {weights} of weights")
    for bad in one.get("nonfinite", ()):
        counts = f"{bad['nan']} NaN and {bad['infinite']} infinite of {bad['size']}"
        render.result(f"    BROKEN {bad['name']}: {counts}; get the checkpoint again")
    if one.get("nonfinite") == []:
        render.result("    every weight is a finite number")
    for companion in one.get("companions", ()):
        render.result(f"    companion {companion['name']}, runs: {companion['schedule']}")
        _graph(companion)


def compare(
    a: Annotated[
        str,
        typer.Argument(help="BUNDLE or BUNDLE@STAGE, FILE.onnx, artifact, diffusers folder."),
    ],
    b: Annotated[str, typer.Argument(help="What to compare it with, the reference.")],
    component: Components = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    dim: Annotated[
        list[str] | None, typer.Option(help="NAME=SIZE of a dynamic axis; repeatable.")
    ] = None,
    hooks: Annotated[
        str | None,
        typer.Option(help="Python with preprocess(inputs) or postprocess(outputs): dict to dict."),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(help="A folder that record wrote: its inputs in place of seeded ones."),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Of the recorded ones at most so many; the worst decides.", min=1)
    ] = 8,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also layer by layer: where does the error begin?")
    ] = False,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the plots of --layers.")
    ] = Path("layers"),
    as_json: Json = False,
) -> None:
    """Run the same inputs through both and judge the distance; exit code 1 if too far."""
    from sdopt import api

    sizes = one_size_each(dim or [], "compare")
    options: dict[str, Any] = {
        "components": component,
        "seed": seed,
        "sizes": sizes,
        "hooks": hooks,
        "recorded": recorded,
        "samples": samples,
    }
    with render.progress("compare") as tell:
        found = api.compare(a, b, progress=tell, **options)
    inside: tuple[LayerComparison, ...] = ()
    if layers:
        with render.progress("layers") as tell:
            inside = api.compare_layers(a, b, progress=tell, **options)
    if as_json:
        more = {"layers": [one.to_json() for one in inside]} if layers else {}
        render.dump({**found.to_json(), **more})
    else:
        for line in [*found.lines(), *(line for one in inside for line in one.lines())]:
            render.result(line)
    if layers:
        _plots(inside, output)
    if not found.passed:
        raise typer.Exit(1)


def _plots(inside: tuple[LayerComparison, ...], folder: Path) -> None:
    """A page of all, and an image of each."""
    from sdopt import datafile
    from sdopt.compare.layer_report import page

    folder.mkdir(parents=True, exist_ok=True)
    page(inside).write(folder / "layers.html")
    for one in inside:
        datafile.write_bytes(folder / f"{one.component}.png", one.chart().png())
    render.say(f"plots: {folder / 'layers.html'}, and a PNG of each component beside it")


def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass's page.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As Markdown; every built-in pass without a name.")
    ] = False,
) -> None:
    """List the passes, or show what one does, when it applies, and its options."""
    from sdopt import pages, registry
    from sdopt.passes.presets import PRESETS

    if name:
        page = pages.page(registry.resolve("passes", name))
        render.result(page.markdown() if markdown else page.text())
        return
    if markdown:
        render.result(pages.document().rstrip("\n"))
        return
    for word in registry.table("passes"):
        cls = registry.resolve("passes", word)
        summary = (pyinspect.getdoc(cls) or "").split("\n", 1)[0]
        render.result(f"{word:<18} {cls.numerics.value:<13} {summary}")
    for preset, text in PRESETS.items():
        render.result(f"@{preset:<17} {'preset':<13} {text}")


def targets() -> None:
    """List the targets, what each needs, and whether it is installed."""
    from sdopt import registry
    from sdopt.errors import MissingDependencyError

    for word in registry.table("targets"):
        cls = registry.resolve("targets", word)
        target = cls()
        summary = (pyinspect.getdoc(cls) or "").split("\n", 1)[0]
        try:
            target.check_available()
            state = ", ".join(f"{name} {version}" for name, version in target.versions().items())
        except MissingDependencyError as error:
            state = f"missing: {error.hint}"
        render.result(f"{word:<8} {summary} ({state})")
