"""Files by what they hold: a node of a cluster gets each one once, in pieces, and checks it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdopt import datafile
from sdopt.errors import BundleError, StorageError, storage_error
from sdopt.sweep.place import Place, waiting_lock

PIECE = 8 << 20
"""Bytes that travel at once; nothing larger is ever held."""


@dataclass(frozen=True)
class Blob:
    """A file of a place.

    Attributes:
        path: relative to the place's root.
        digest: sha256 of its bytes, in hex.
        size: in bytes.
    """

    path: str
    digest: str
    size: int


Read = Callable[[Blob], Iterable[bytes]]
"""Gives a blob's bytes in pieces."""


class Digests:
    """The files of a place by content; each is read once, and again only when it was changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[tuple[int, int, int], Blob]] = {}

    def blob(self, path: str) -> Blob:
        """A file's digest and size.

        Args:
            path: relative to the root.

        Raises:
            BundleError: it is not there.
        """
        file = self._root / path
        try:
            found = file.stat()
            mark = (found.st_ino, found.st_size, found.st_mtime_ns)
            known = self._known.get(path)
            if known is None or known[0] != mark:
                known = (mark, Blob(path, digest_of(file), found.st_size))
                self._known[path] = known
        except OSError as error:
            raise BundleError(
                "a file of the sweep is missing",
                where=str(file),
                why=error.strerror or str(error),
                hint="begin again in another folder (-o)",
            ) from error
        return known[1]


class Cache:
    """The blobs that a machine has, one file per digest, for all its processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"make {folder}") from error

    def place(self, blobs: Iterable[Blob], place: Place, read: Read) -> None:
        """Have all blobs at their paths in a place, in the order given.

        Those that are not here yet are fetched, each by one process while others wait for it.

        Raises:
            StorageError: no room, or what came is not what was announced.
        """
        wanted = list(blobs)
        files = [self.fetch(blob, read) for blob in wanted]
        with place.writing():
            for blob, file in zip(wanted, files, strict=True):
                _link(file, place.root / blob.path)

    def fetch(self, blob: Blob, read: Read) -> Path:
        """The blob's file, fetched if no process of this machine did that yet.

        Raises:
            StorageError: see ``place``.
        """
        file = self._folder / blob.digest
        with waiting_lock(self._folder / f"{blob.digest}.lock"):
            if not file.is_file():
                writer = Writer(blob, file.with_suffix(".tmp"))
                try:
                    for piece in read(blob):
                        writer.add(piece)
                    writer.commit(file)
                finally:
                    writer.drop()
        return file

    def add(self, blob: Blob, file: Path) -> None:
        """Keep a file that was made here, so that it need not be fetched."""
        _link(file, self._folder / blob.digest)


def digest_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(file, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pieces(file: Path) -> Iterator[bytes]:
    """A file's bytes, ``PIECE`` at a time."""
    with open(file, "rb", buffering=0) as stream:
        while piece := stream.read(PIECE):
            yield piece


class Writer:
    """Writes one blob, piece by piece, to a file that has its name only when it is whole.

    Args:
        blob: what it is to be.
        temporary: the file meanwhile, on the file system of the final one.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, blob: Blob, temporary: Path) -> None:
        self._blob, self._temporary = blob, temporary
        self._state = hashlib.sha256()
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(temporary, "wb", buffering=0)  # noqa: SIM115 - see drop
        except OSError as error:
            raise storage_error(error, f"write {blob.path}") from error

    def add(self, piece: bytes) -> None:
        """Write the next piece.

        Raises:
            StorageError: no room.
        """
        try:
            left = memoryview(piece)
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            raise storage_error(error, f"write {self._blob.path}") from error
        self._state.update(piece)

    def commit(self, file: Path) -> None:
        """Check what was written, and give it its name.

        Raises:
            StorageError: it is not the blob, or cannot be renamed.
        """
        found = self._state.hexdigest()
        if found != self._blob.digest:
            raise StorageError(
                "a file came over with other bytes than were announced",
                where=self._blob.path,
                why=f"sha256 {found[:12]} and not {self._blob.digest[:12]}",
                hint="was the sweep's folder changed meanwhile? Run it again",
            )
        try:
            os.fsync(self._stream.fileno())
            file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._temporary, file)
        except OSError as error:
            raise storage_error(error, f"write {self._blob.path}") from error

    def drop(self) -> None:
        """Leave nothing open, and nothing behind that was not committed."""
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


def in_order(paths: Iterable[str]) -> Sequence[str]:
    """Paths with graphs behind the data files that they use, each once."""
    return sorted(dict.fromkeys(paths), key=lambda path: path.endswith(".onnx"))


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has none."""
    if target.is_file() and os.path.samefile(file, target):
        return
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, temporary)
        except OSError:  # no links here, or none to another file system
            datafile.copy_file(file, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise storage_error(error, f"write {target.name}") from error
    finally:
        temporary.unlink(missing_ok=True)
