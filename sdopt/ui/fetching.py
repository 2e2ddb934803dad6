"""One file by URL to disk: streamed, limited, resumed, checked, from public addresses only."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import httpx

from sdopt.errors import FetchError, UsageError, storage_error
from sdopt.report import Progress
from sdopt.ui import addresses, partial, storing
from sdopt.ui.addresses import CheckedTransport
from sdopt.ui.partial import Note, Part
from sdopt.units import size

TRIES = 5
"""How often a download that breaks off without getting further is tried."""
REDIRECTS = 5
_BLOCK = 1 << 20
_TELL_SECONDS = 0.2
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "sdopt"}


class _BrokenOffError(Exception):
    """A try that may be made again."""


def fetch(
    url: str,
    folder: Path,
    *,
    limit_bytes: int,
    sha256: str | None = None,
    allow_private: bool = False,
    progress: Progress | None = None,
    timeout: float = 30.0,
    pause: Callable[[float], None] = time.sleep,
) -> Path:
    """Download a ``.safetensors`` file into ``folder``; returns where it is.

    What came before a break is kept as ``NAME.part`` and gone on with, in this call and in a
    later one, if the server still has the same file and can. The name is the server's, made
    plain; another file of that name is left alone.

    Args:
        url: http or https; a user and password in it are used and shown nowhere.
        folder: made if it is not there.
        limit_bytes: the most that the file may have.
        sha256: the digest that it is to have, in hexadecimal.
        allow_private: also from this machine and its network.
        progress: is told the share, or that of the limit while the size is not known.
        timeout: seconds without a byte after which a try has failed.
        pause: waits between tries.

    Raises:
        UsageError: no such URL, or no such digest.
        FetchError: it could not be downloaded, or is too large or another file.
        SourceError, WeightsError: it is no safetensors file.
        StorageError: it does not fit on the disk.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256.strip()):
        raise UsageError("this is no SHA-256", hint="it has 64 hexadecimal digits")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sha256.strip().lower() if sha256 else None
    order = _Order(addresses.parsed(url), folder, limit_bytes, wanted, progress)
    failed = 0
    with httpx.Client(
        transport=CheckedTransport(allow_private),
        headers=_HEADERS,
        timeout=timeout,
        follow_redirects=True,
        max_redirects=REDIRECTS,
        trust_env=False,
    ) as client:
        while True:
            before = order.reached
            try:
                return order.run(client)
            except (_BrokenOffError, httpx.TransportError) as error:
                failed = failed + 1 if order.reached <= before else 1
                if failed >= TRIES or isinstance(error, httpx.UnsupportedProtocol):
                    raise order.error(
                        "the download broke off",
                        order.reason(error),
                        f"try again: {size(order.reached)} are kept" if order.reached else None,
                    ) from error
                pause(2.0 ** (failed - 1))
            except httpx.TooManyRedirects as error:
                why = f"it did so more than {REDIRECTS} times"
                raise order.error("the server redirects too often", why) from error
            except OSError as error:
                raise storage_error(error, f"download into {folder}") from error


@dataclass
class _Order:
    """What is to be downloaded; ``reached`` is how many bytes of it are on disk."""

    url: httpx.URL
    folder: Path
    limit_bytes: int
    sha256: str | None
    progress: Progress | None
    reached: int = 0
    state: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def shown(self) -> str:
        """The URL without user, password, query and fragment, any of which may be a secret."""
        return str(self.url.copy_with(userinfo=b"", query=None, fragment=None))

    @property
    def key(self) -> str:
        """What a part is known by."""
        digest = hashlib.sha256(self.url.query).hexdigest()[:16]
        return f"{self.shown}?{digest}" if self.url.query else self.shown

    def error(self, message: str, why: str, hint: str | None = None) -> FetchError:
        return FetchError(message, where=self.shown, why=why, hint=hint)

    def reason(self, error: Exception) -> str:
        """Why a try failed, in words that hold nothing of the URL."""
        if isinstance(error, httpx.TimeoutException):
            return "the server did not answer in time"
        return str(error) if isinstance(error, _BrokenOffError) else type(error).__name__

    def run(self, client: httpx.Client) -> Path:
        """One try."""
        known = partial.find(self.folder, self.key)
        note = known.note() if known is not None else None
        headers = {}
        if known is not None and note is not None and (have := known.path.stat().st_size):
            headers = {"Range": f"bytes={have}-", "If-Range": note.validator}
        with client.stream("GET", self.url, headers=headers) as response:
            if response.status_code == 416 and known is not None and note is not None:
                return self._unsatisfied(known, note)
            self._check(response)
            name = _name(response, self.url)
            if response.status_code == 206:
                part = self._going_on(response, known, note)
            else:
                part = self._anew(response, Part(self.folder, name))
            with part.opened() as file:
                self._stream(response, part, file)
            return self._finish(part)

    def _check(self, response: httpx.Response) -> None:
        """Refuse what is no answer to the request, and what is too large."""
        code = response.status_code
        if code in _AGAIN:
            raise _BrokenOffError(f"the server answered {code} {response.reason_phrase}")
        if code not in (200, 206):
            hint = "it wants a login: add its token to the URL" if code in (401, 403) else None
            why = f"it answered {code} {response.reason_phrase}"
            raise self.error("the server does not give this file", why, hint)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self.error("the server compresses the file", "it was asked not to")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise self.error(
                "this URL is of a web page", "no model is sent as HTML", "copy the download's link"
            )

    def _anew(self, response: httpx.Response, part: Part) -> Part:
        """Begin a part, in place of what was there."""
        total = _length(response)
        self._limit(total)
        storing.check_space(self.folder, max(total, 0))
        with part.opened() as file:
            file.truncate(0)
        part.write_note(_note(self.key, response, total))
        self.reached = 0
        self.state = hashlib.sha256()
        return part

    def _going_on(self, response: httpx.Response, known: Part | None, note: Note | None) -> Part:
        """The part that a range continues, which must be the range that was asked for."""
        match = re.fullmatch(
            r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "")
        )
        if known is None or note is None or match is None:
            raise self.error("the server sent a range that nobody asked for", "206")
        have = known.path.stat().st_size
        total = note.total if match[3] == "*" else int(match[3])
        if int(match[1]) != have or _note(self.key, response, total).contradicts(note):
            known.remove()
            raise _BrokenOffError("the file changed on the server")
        self._limit(total)
        storing.check_space(self.folder, max(total - have, 0))
        self._read(known)
        return known

    def _unsatisfied(self, known: Part, note: Note) -> Path:
        """All of it was there already, or the part is longer than the file is now."""
        if known.path.stat().st_size != note.total:
            known.remove()
            raise _BrokenOffError("the file changed on the server")
        self._read(known)
        return self._finish(known)

    def _read(self, known: Part) -> None:
        """Take in what an earlier try left, for the digest of the whole."""
        self.state, self.reached = hashlib.sha256(), known.path.stat().st_size
        with open(known.path, "rb") as file:
            while self.sha256 is not None and (block := file.read(_BLOCK)):
                self.state.update(block)

    def _stream(self, response: httpx.Response, part: Part, file: BinaryIO) -> None:
        file.seek(self.reached)
        note = part.note()
        total = note.total if note is not None else -1
        told = 0.0
        try:
            # As it comes: a block that httpx gathers is lost where the connection breaks.
            for block in response.iter_raw():
                self._limit(self.reached + len(block))
                file.write(block)
                if self.sha256 is not None:
                    self.state.update(block)
                self.reached += len(block)
                if self.progress and time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    whole = total if total > 0 else self.limit_bytes
                    self.progress(f"download {part.name}", min(1.0, self.reached / whole))
        except FetchError:
            part.remove()  # too large: no later try may go on with it
            raise
        finally:
            file.flush()
            os.fsync(file.fileno())
        if 0 <= total != self.reached:
            raise _BrokenOffError(f"{size(self.reached)} of {size(total)} came")

    def _limit(self, count: int) -> None:
        if count > self.limit_bytes:
            raise self.error(
                "the file is too large",
                f"it has {size(count)} or more, and {size(self.limit_bytes)} are allowed",
                "copy it below the root by other means, or start sdopt ui with a larger limit",
            )

    def _finish(self, part: Part) -> Path:
        digest = self.state.hexdigest()
        if self.sha256 is not None and digest != self.sha256:
            part.remove()
            raise self.error(
                "this is not the file that was meant",
                f"its SHA-256 is {digest}, not {self.sha256}",
                "compare the digest with the one that its author gives",
            )
        named = self.folder / f".{part.name}"
        os.replace(part.path, named)
        part.note_path.unlink(missing_ok=True)
        try:
            storing.check_weights(named)
            return storing.settle(named, self.folder, part.name)
        finally:
            named.unlink(missing_ok=True)


def _length(response: httpx.Response) -> int:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else -1


def _note(key: str, response: httpx.Response, total: int) -> Note:
    etag = response.headers.get("ETag", "")
    strong = "" if etag.startswith("W/") else etag
    return Note(key, strong, response.headers.get("Last-Modified", ""), total)


def _name(response: httpx.Response, url: httpx.URL) -> str:
    """The file's name as the server says it, else as the URL does; a plain one in any case.

    Raises:
        SourceError: it is of no weights file.
    """
    message = Message()
    message["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    said = message.get_filename() or unquote(url.path.rstrip("/").rpartition("/")[2])
    return storing.weights_name(said)
