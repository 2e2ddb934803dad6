"""The arguments and options that several verbs have in common, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
