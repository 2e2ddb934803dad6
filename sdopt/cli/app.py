"""The verbs and their options; each imports what it needs when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sdopt.cli import (
    benching,
    building,
    evaluating,
    generate,
    inspecting,
    precision,
    reporting,
    serving,
    sweeping,
    transform,
)

app = typer.Typer(
    name="sdopt",
    help="Turn diffusion models into fast inference artifacts: export, optimize, build, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        import sdopt

        print(sdopt.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Turn diffusion models into fast inference artifacts: export, optimize, build, run."""


app.command("export")(transform.export)
app.command("adopt")(transform.adopt)
app.command("optimize")(transform.optimize)
app.command("build")(building.build)
app.command("run")(generate.run)
app.command("record")(generate.record)
app.command("bench")(benching.bench)
app.command("eval")(evaluating.evaluate)
app.command("compare")(inspecting.compare)
app.command("precision")(precision.precision)
app.command("inspect")(inspecting.inspect)
app.command("report")(reporting.report)
app.command("ui")(serving.ui)
app.add_typer(sweeping.app, name="sweep")
app.command("pack")(transform.pack)
app.command("passes")(inspecting.passes)
app.command("targets")(inspecting.targets)
