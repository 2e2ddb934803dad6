"""Stands before the page: who may ask, under which name, from which page, for what, how much."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdopt.ui.app import is_loopback
from sdopt.ui.passwords import DELAY_SECONDS, REFUSED_SECONDS, Account, Guesses

MAX_BODY_BYTES = 8 << 20
"""Of a request that is no upload; such bodies are held in memory."""
_ENVELOPE = 1 << 16
"""What a multipart body has beside the file, at most."""
UPLOAD = "/gradio_api/upload"
_FILES = ("/gradio_api/file=", "/gradio_api/file/")
_UNUSED = (
    # What gradio can do and this page does not: it would fetch URLs, run code, or tell of itself.
    "/gradio_api/proxy=",
    "/gradio_api/custom_component",
    "/gradio_api/deep_link",
    "/gradio_api/dev",
    "/gradio_api/mcp",
    "/gradio_api/openapi.json",
    "/gradio_api/process_recording",
    "/gradio_api/profiling",
    "/gradio_api/run-history",
    "/gradio_api/runs",
    "/gradio_api/undo-vibe-edit",
    "/gradio_api/vibe",
    "/monitoring",
    "/pwa_icon",
)
_OPEN = ("/manifest.json", "/favicon.ico", "/robots.txt")
"""Browsers ask for these without a password, and nothing of the user is in them."""
_SAFE = ("GET", "HEAD", "OPTIONS")

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
"""What a browser may load for the page: nothing of any other host."""
_ANSWERED = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """What the guard lets through.

    Attributes:
        is_local: only requests to a loopback address or ``localhost`` are for this server.
        names: names beside addresses that requests may be to; without a port, in lower case.
        account: who may connect; None lets everyone.
        max_upload_bytes: of an uploaded file.
        files: folders whose files a request may name.
        room: is asked before an upload whether so many bytes have room; a reason why not, or None.
    """

    is_local: bool
    names: frozenset[str]
    account: Account | None
    max_upload_bytes: int
    files: tuple[Path, ...]
    room: Callable[[int], str | None] = lambda _: None


@dataclass
class Guard:
    """An ASGI application around another one."""

    app: ASGIApp
    rules: Rules
    guesses: Guesses = field(default_factory=Guesses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, and pass on any other."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page has no websockets: not accepted is closed
        headers = Headers(scope=scope)
        client = scope["client"][0] if scope.get("client") else ""
        refused = self._refused(scope, headers)
        if refused is None:
            refused = await self._unknown(scope, headers, client)
        if refused is None and scope["method"] not in _SAFE:
            refused, receive = await self._body(scope, headers, receive)
        if refused is not None:
            await refused(scope, receive, _hardened(send))
            return
        await self.app(scope, receive, _hardened(send))

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_ours(host):
            return _answer(421, "This server is not reached under that name.")
        if not _same_origin(scope, headers, host):
            return _answer(403, "Another page may not ask for this.")
        path = unquote(scope["path"])
        folded = path.lower().replace("//", "/")
        if "\0" in path or ".." in path.split("/") or folded.startswith(_UNUSED):
            return _answer(404, "Not found.")
        for start in _FILES:
            if path.startswith(start) and not self._is_file_of_ours(path.removeprefix(start)):
                return _answer(403, "This file is not served.")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server: DNS rebinding needs a name of its own."""
        name = _without_port(host).lower()
        if is_loopback(name):
            return True
        if name in self.rules.names:
            return True
        return not self.rules.is_local and _is_address(name)

    async def _unknown(self, scope: Scope, headers: Headers, client: str) -> Response | None:
        account = self.rules.account
        if account is None or (scope["path"] in _OPEN and scope["method"] in _SAFE):
            return None
        if self.guesses.is_refused(client):
            wait = {"Retry-After": str(int(REFUSED_SECONDS))}
            return PlainTextResponse("Too many wrong passwords; wait.", 429, wait)
        given = headers.get("authorization")
        if given is not None and account.accepts(given):
            self.guesses.right(client)
            scope["sdopt.user"] = account.user
            return None
        if given is not None:
            self.guesses.wrong(client)
            await asyncio.sleep(DELAY_SECONDS)
        ask = {"WWW-Authenticate": 'Basic realm="sdopt", charset="UTF-8"'}
        return PlainTextResponse("A user and a password are needed.", 401, ask)

    async def _body(
        self, scope: Scope, headers: Headers, receive: Receive
    ) -> tuple[Response | None, Receive]:
        """Limit what is sent; an upload streams, anything else is read and looked into."""
        said = headers.get("content-length", "")
        length = int(said) if said.isdecimal() and len(said) < 20 else None
        if scope["path"].rstrip("/") == UPLOAD:
            limit = self.rules.max_upload_bytes
            if length is not None and length > limit + _ENVELOPE:
                return _answer(413, f"A file may have {limit} bytes at most."), receive
            if (why := self.rules.room(length or 0)) is not None:
                return _answer(507, why), receive
            return None, _limited(receive, limit + _ENVELOPE)
        if length is not None and length > MAX_BODY_BYTES:
            return _answer(413, "This request is too large."), receive
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return _answer(400, "The request broke off."), receive
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                return _answer(413, "This request is too large."), receive
            if not message.get("more_body"):
                break
        if not self._names_only_ours(bytes(body)):
            return _answer(403, "This file was not uploaded."), receive
        return None, _replay(bytes(body), receive)

    def _names_only_ours(self, body: bytes) -> bool:
        """Whether every file that a JSON body names was sent by a browser or made for one.

        gradio checks it too, but not in an application that was mounted (6.31), and where a path
        is a URL it fetches that.
        """
        try:
            data = json.loads(body)  # as FastAPI reads it
        except RecursionError:
            return False
        except ValueError:
            return True  # no JSON: then no path is read from it
        return all(self._is_file_of_ours(path) for path in _paths(data))

    def _is_file_of_ours(self, path: str) -> bool:
        if "\0" in path:
            return False
        real = Path(os.path.realpath(path))
        ours = any(real.is_relative_to(one) for one in self.rules.files)
        return os.path.isabs(path) and ours and real.is_file()


def basic(user: str, password: str) -> str:
    """The header's value that ``Account.accepts`` takes."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _answer(code: int, text: str) -> Response:
    return PlainTextResponse(text + "\n", code)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _same_origin(scope: Scope, headers: Headers, host: str) -> bool:
    """Whether a request comes from this page, or from no page at all."""
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "")
    safe = scope["method"] in _SAFE
    if site not in ("same-origin", "none") and not (safe and mode == "navigate"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    scheme, _, place = origin.partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    return bool(place) and place.removesuffix(default) == host.lower().removesuffix(default)


def _paths(data: Any) -> Iterator[str]:
    """Every text that stands under ``path`` in JSON."""
    todo = [data]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if isinstance(path := one.get("path"), str):
                yield path
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once more, and after it whatever comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _limited(receive: Receive, most: int) -> Receive:
    """Ends a body that has not said its length where it becomes too long."""
    left = most

    async def some() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return some


def _hardened(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _ANSWERED.items():
                headers[name] = value
        await send(message)

    return sent
