"""Ends the streams of open pages when the server stops; else it would wait for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Ending:
    """An ASGI application around another one, whose GETs end when ``closing`` is set."""

    app: ASGIApp
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        sent: list[Message] = []

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.append(message)
            await send(message)

        answer = asyncio.ensure_future(self.app(scope, receive, noted))
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait({answer, closing}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            closing.cancel()
            answer.cancel()
        if not answer.done():
            await asyncio.wait({answer})
            # A stream says no length, so it may end here as if it were whole.
            if sent and "content-length" not in Headers(raw=sent[0]["headers"]):
                await send({"type": "http.response.body"})
