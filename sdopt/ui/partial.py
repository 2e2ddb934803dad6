"""A download that is not finished: ``NAME.part`` and, beside it, what it is a part of."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sdopt import reading
from sdopt.errors import FetchError

PART = ".part"
NOTE = ".part.json"


@dataclass(frozen=True)
class Note:
    """What a part is of.

    Attributes:
        url: without what might be secret in it; of a query a digest.
        etag: the server's strong ETag, or empty.
        modified: its Last-Modified, or empty.
        total: the whole file's bytes; -1 where the server does not say.
    """

    url: str
    etag: str = ""
    modified: str = ""
    total: int = -1

    @property
    def validator(self) -> str:
        """What If-Range takes; without one a part cannot be gone on with."""
        return self.etag or self.modified

    def contradicts(self, other: Note) -> bool:
        """Whether the two cannot be of one state of one file; a server may leave out half."""
        both = ((self.etag, other.etag), (self.modified, other.modified))
        return self.total != other.total or any(a and b and a != b for a, b in both)


@dataclass(frozen=True)
class Part:
    """A part on disk; the final name is ``name``."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The bytes."""
        return self.folder / (self.name + PART)

    @property
    def note_path(self) -> Path:
        """What they are of."""
        return self.folder / (self.name + NOTE)

    def note(self) -> Note | None:
        """What the part is of; None where that is lost, and the part with it."""
        if not self.note_path.is_file() or not self.path.is_file():
            return None
        try:
            found = reading.fields(Note, reading.table(self.note_path.read_bytes()))
        except (TypeError, ValueError):
            return None
        return Note(**found) if "url" in found else None

    def write_note(self, note: Note) -> None:
        """Say what the part is of, before its first byte."""
        temporary = self.note_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(note)), "utf-8")
        os.replace(temporary, self.note_path)

    def remove(self) -> None:
        """Forget the part."""
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The part open for appending, for this process alone.

        Raises:
            FetchError: another one writes it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.path, flags, 0o600), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FetchError(
                    "this file is being downloaded already", where=str(self.path)
                ) from None
            yield file


def find(folder: Path, url: str) -> Part | None:
    """The part that an earlier try left of a URL, if it can be gone on with."""
    for path in sorted(folder.glob(f"*{NOTE}")):
        part = Part(folder, path.name.removesuffix(NOTE))
        note = part.note()
        if note is not None and note.url == url and note.validator:
            return part
    return None
