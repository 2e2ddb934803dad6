"""A file server on this machine that breaks off, changes its mind, and lies, as it is told."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hosted:
    """What is served, how, and what was asked for."""

    content: bytes
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True
    says_length: bool = True
    break_after: list[int] = field(default_factory=list)
    """Bytes after which each next answer breaks off."""
    disposition: str = ""
    content_type: str = "application/octet-stream"
    status: list[int] = field(default_factory=list)
    """Codes of the next answers."""
    location: str = ""
    pause_seconds: float = 0.0
    before: Callable[[Hosted], None] = lambda _: None
    requests: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/files/model.safetensors"


@contextmanager
def hosting(hosted: Hosted) -> Iterator[Hosted]:
    """The server, in a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            hosted.requests.append({"path": self.path, **self.headers})
            hosted.before(hosted)
            if hosted.status:
                code = hosted.status.pop(0)
                self.send_response(code)
                if hosted.location:
                    self.send_header("Location", hosted.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(hosted.content, self._start(len(hosted.content)))

        def _start(self, whole: int) -> int:
            """Answer the head; returns where the body begins."""
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            known = self.headers.get("If-Range") in (hosted.etag, hosted.modified)
            begin = int(asked[1]) if asked and known and hosted.ranges else 0
            if asked and known and begin >= whole:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return whole
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{whole - 1}/{whole}")
            for name, value in (
                ("ETag", hosted.etag),
                ("Last-Modified", hosted.modified),
                ("Content-Disposition", hosted.disposition),
                ("Content-Type", hosted.content_type),
                ("Content-Length", str(whole - begin) if hosted.says_length else ""),
            ):
                if value:
                    self.send_header(name, value)
            if not hosted.says_length:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            return begin

        def _send(self, content: bytes, begin: int) -> None:
            rest = content[begin:]
            if hosted.break_after:
                rest = rest[: hosted.break_after.pop(0)]
                self.close_connection = True
            try:
                self.wfile.write(rest[: len(rest) // 2])
                self.wfile.flush()
                time.sleep(hosted.pause_seconds)
                self.wfile.write(rest[len(rest) // 2 :])
            except OSError:
                self.close_connection = True  # the client had enough

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 20

    with Server(("127.0.0.1", 0), Handler) as server:
        hosted.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hosted
        finally:
            server.shutdown()
            thread.join()
