"""``ui``: the page in the browser."""

from __future__ import annotations

import re
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from sdopt.cli import render
from sdopt.errors import UsageError


def ui(
    root: Annotated[
        Path, typer.Option(help="The folder it works in; nothing outside is read or written.")
    ] = Path(),
    host: Annotated[str, typer.Option(help="Where to listen; others need --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 7860,
    auth: Annotated[
        str | None, typer.Option(help="USER:FILE; the password stands in FILE, of mode 600.")
    ] = None,
    max_upload: Annotated[
        str, typer.Option(help="Of a file that is uploaded or downloaded, at most.")
    ] = "50GB",
    allow_private_urls: Annotated[
        bool,
        typer.Option("--allow-private-urls", help="URLs may lead to this machine's network."),
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A name it is reached by, that of a proxy say; repeatable."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Serve a page: upload or fetch a model, export, optimize, build, draw, download."""
    from sdopt.ui import Settings, serve

    settings = Settings(
        root, host, port, auth, _bytes(max_upload), allow_private_urls, tuple(name or ())
    )

    def started(address: str) -> None:
        render.result(address)
        render.say("Ctrl-C stops it; a job that runs goes on, and the queue is kept")
        if not settings.is_local:
            render.say("note: the connection is not encrypted; put a proxy with TLS before it")
        if open_browser:
            webbrowser.open(address)

    serve(settings, started)
    render.say("stopped")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _bytes(text: str) -> int:
    """``50GB`` or ``800 MB`` in bytes.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d{1,15}) ?([KMGT]?)B?", text.strip().upper())
    if match is None or not int(match[1]):
        raise UsageError(f"{text!r} is no size", hint="write 50GB, 800MB or a number of bytes")
    return int(match[1]) * _UNITS[match[2]]
