"""The arguments and options that several verbs have in common, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdopt.errors import UsageError

BundleArgument = Annotated[Path, typer.Argument(help="The bundle; the current folder by default.")]
ModelArgument = Annotated[
    Path, typer.Argument(help="A bundle or one FILE.onnx; the current folder by default.")
]
Components = Annotated[
    list[str] | None, typer.Option("--component", "-c", help="Only this component; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Run although the stage is up to date.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Report what would be done; write nothing.")
]
Target = Annotated[str, typer.Option("--target", "-t", help="e.g. ort, ort:threads=2")]


def one_size_each(dims: list[str], verb: str) -> dict[str, int]:
    """``--dim NAME=SIZE``, repeated, for a verb that takes no range of sizes.

    Raises:
        UsageError: a range, or text that is no size.
    """
    from sdopt.shapes import parse_dim

    sizes = {}
    for name, (low, high) in map(parse_dim, dims):
        if low != high:
            raise UsageError(f"{verb} takes one size of an axis", hint=f"--dim {name}={high}")
        sizes[name] = high
    return sizes
