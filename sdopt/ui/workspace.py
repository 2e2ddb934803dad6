"""The folder that the page works in: every path from a user becomes one below it, or an error."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from sdopt import datafile
from sdopt.errors import PathError, UsageError, storage_error
from sdopt.ui import names, storing
from sdopt.ui.listing import INDEX, AdapterFile, BundleEntry, Listing, Source, is_bundle

OWN = ".sdopt-ui"
"""The folder below the root that holds what the server itself needs."""
UPLOADS = "uploads"
"""The folder below the root that uploaded and downloaded models lie in."""
PICTURES = "pictures"
"""The folder in the server's own that start images lie in, as long as jobs may need them."""
_STALE_SECONDS = 24 * 3600.0


class Workspace:
    """A root folder, outside of which nothing is read or written.

    Args:
        root: an existing folder.

    Attributes:
        root: its real path.
        incoming: what browsers send, until ``take``; on the same file system as the root, so
            that a file of any size is taken by a rename.
        outgoing: what browsers may fetch by name: archives.

    Raises:
        UsageError: there is no such folder.
        StorageError: it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UsageError("there is no such folder", where=str(root), hint=f"mkdir -p {root}")
        self.root = Path(os.path.realpath(root))
        self.incoming = self.root / OWN / "incoming"
        self.outgoing = self.root / OWN / "outgoing"
        try:
            for folder in (self.root / OWN, self.incoming, self.outgoing):
                folder.mkdir(mode=0o700, exist_ok=True)
                if folder.is_symlink():
                    raise PathError("this folder is to be no link", where=str(folder))
        except OSError as error:
            raise storage_error(error, f"make {OWN} in {root}") from error
        self._listing = Listing(self.root)

    def resolve(self, name: str) -> Path:
        """The real path of a file or folder that a user chose or typed, relative to the root.

        Raises:
            PathError: it is not there, hidden, or outside the root, or holds a link out of it.
        """
        found = names.inside(self.root, name)
        names.check("/".join(found.relative_to(self.root).parts))  # a link to what is hidden
        if found.is_dir():
            names.check_links(found, self.root)
        return found

    def relative(self, path: Path) -> str:
        """A path below the root as ``resolve`` takes it.

        Raises:
            PathError: it is outside.
        """
        real = Path(os.path.realpath(path))
        if real == self.root or not real.is_relative_to(self.root):
            raise PathError("this path is not below the root", where=str(path))
        return real.relative_to(self.root).as_posix()

    def new_bundle(self, name: str) -> Path:
        """Where a bundle called ``name`` is to be written; it may be one that is there.

        Raises:
            PathError: the name holds more than letters, digits and ``. _ -``, or is taken.
        """
        path = self.root / names.plain(name)
        if name == UPLOADS or path.is_symlink() or (path.exists() and not _may_become(path)):
            raise PathError(
                f"{name!r} is taken, and not by a bundle",
                hint="choose another name for the bundle",
            )
        return path

    def fresh_name(self, stem: str) -> str:
        """A name for a new bundle, made from any text, that nothing below the root has."""
        made = names.made_plain(stem, "bundle").removesuffix(storing.SUFFIX)[:90].rstrip("._-")
        base = made if made not in ("", UPLOADS) else "bundle"
        tried = (base if number == 1 else f"{base}-{number}" for number in itertools.count(1))
        return next(one for one in tried if not os.path.lexists(self.root / one))

    def sources(self) -> list[Source]:
        """The models below the root, with what they are and lack; reads headers only."""
        return self._listing.sources()

    def bundles(self) -> list[BundleEntry]:
        """The bundles below the root."""
        return self._listing.bundles()

    def adapters(self) -> list[AdapterFile]:
        """The LoRA files below the root, with what they change."""
        return self._listing.adapters()

    def describe(self, name: str) -> Source | AdapterFile:
        """What one file or folder is that a user chose.

        Raises:
            PathError: see ``resolve``.
        """
        return self._listing.source(self.resolve(name))

    def take(self, upload: Path, name: str) -> Path:
        """Move a model that a browser sent to ``uploads/NAME``; returns where it is now.

        Nothing is overwritten: another file of the name makes it ``NAME-2``, the same bytes are
        kept once. The bytes do not pass through memory.

        Raises:
            PathError: ``upload`` was not sent by a browser.
            SourceError, WeightsError: it is no whole safetensors file.
        """
        file = self._sent(upload)
        kept = storing.weights_name(name)
        if file.suffix != storing.SUFFIX:
            raise PathError("this upload has no name of a model", where=names.shown(upload.name))
        storing.check_weights(file)
        return storing.settle(file, self.uploads, kept)

    def picture(self, upload: Path) -> Path:
        """An image that a browser sent, which decodes and is not too large; it stays there.

        Raises:
            PathError: ``upload`` was not sent by a browser.
            UsageError: it is no image, or too large.
        """
        file = self._sent(upload)
        storing.check_picture(file)
        return file

    def keep_picture(self, upload: Path) -> str:
        """An image that a browser sent, kept for the jobs that name it; its path below the root.

        Raises:
            PathError, UsageError: see ``picture``.
            StorageError: the disk is full.
        """
        data = self.picture(upload).read_bytes()
        kept = self.root / OWN / PICTURES / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        datafile.write_bytes(kept, data)
        return kept.relative_to(self.root).as_posix()

    def zipped(self, paths: Sequence[Path], output: str) -> Path:
        """Files and folders of one bundle in ``outgoing/OUTPUT.zip``, named as in the bundle.

        Raises:
            PathError: they are not of one bundle below the root.
            StorageError: the disk is full.
        """
        real = [self.resolve(self.relative(path)) for path in paths]
        homes = {home for path in real if (home := self._home(path)) is not None}
        if len(homes) != 1 or any(self._home(path) is None for path in real):
            raise PathError(
                "an archive is made of what lies in one bundle",
                where=", ".join(self.relative(path) for path in real[:3]),
            )
        made = self.outgoing / (names.made_plain(output, "bundle").removesuffix(".zip") + ".zip")
        storing.write_zip(real, homes.pop(), made)
        return made

    def shown(self, path: Path) -> Path:
        """A copy of a file below the root that browsers may be given, an image of a job say.

        It is made inside the kernel, once for each state of the file, and goes away with the
        uploads.

        Raises:
            PathError: it is outside the root, no file, or the server's own.
        """
        name = self.relative(path)
        real, state = self.root / name, (self.root / name).stat()
        if not real.is_file() or real.is_relative_to(self.root / OWN):
            raise PathError("this file is not to be shown", where=names.shown(name))
        text = f"{name}\0{state.st_size}\0{state.st_mtime_ns}"
        folder = self.incoming / f"shown-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        copy = folder / names.made_plain(real.name)
        if not copy.is_file():
            folder.mkdir(exist_ok=True)
            datafile.copy_file(real, copy)
        return copy

    @property
    def uploads(self) -> Path:
        """The folder of models that came from elsewhere.

        Raises:
            PathError: it is a link.
        """
        folder = self.root / UPLOADS
        if folder.is_symlink():
            raise PathError("this folder is to be no link", where=str(folder))
        return folder

    def sweep(self, older_than_seconds: float = _STALE_SECONDS) -> int:
        """Remove uploads and archives that nobody touched for so long; returns how many."""
        limit, removed = time.time() - older_than_seconds, 0
        for folder in (self.incoming, self.outgoing):
            for home, _, files in os.walk(folder, topdown=False):
                for file in files:
                    path = Path(home, file)
                    if path.lstat().st_mtime <= limit:
                        path.unlink(missing_ok=True)
                        removed += 1
                if Path(home) != folder and not os.listdir(home):
                    os.rmdir(home)
        return removed

    def _sent(self, upload: Path) -> Path:
        real = Path(os.path.realpath(upload))
        if upload.is_symlink() or not real.is_file() or not real.is_relative_to(self.incoming):
            raise PathError("this file was not uploaded", where=names.shown(str(upload)))
        return real

    def _home(self, path: Path) -> Path | None:
        """The bundle that a path lies in."""
        above = (path, *path.parents)[: len(path.relative_to(self.root).parts)]
        return next((folder for folder in above if is_bundle(folder)), None)


def _may_become(path: Path) -> bool:
    """Whether a folder is a bundle, or holds nothing yet but what is hidden (its jobs)."""
    if not path.is_dir():
        return False
    return is_bundle(path) or (
        not (path / INDEX).exists() and all(one.startswith(".") for one in os.listdir(path))
    )
