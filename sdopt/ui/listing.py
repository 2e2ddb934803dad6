"""What lies below a root: models that can be exported, bundles, adapters; reads headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdopt.adapters import files as adapter_files
from sdopt.bundle import LOCK, MANIFEST, Bundle
from sdopt.errors import PathError, SdoptError, WeightsError
from sdopt.exporters import open_source
from sdopt.ui import names

INDEX = "model_index.json"
DEPTH = 4
"""Folders below the root that are looked into."""
MOST = 1000
"""Models and adapters that are listed at most."""


@dataclass(frozen=True)
class Source:
    """A model that can be exported, or the reason why it cannot.

    Attributes:
        name: its path relative to the root.
        kind: ``file`` or ``folder``.
        size_bytes: of the file, or of all that lies in the folder.
        family: ``sd1``, ``sd2``, ``sdxl``, ``sdxl_refiner`` or ``sd3``; None where it is no model.
        components: those that can be exported from it.
        missing: folders of a pipeline that it lacks (``text_encoder``, ``vae``), to be supplied.
        notes: what was assumed.
        error: what it is instead of a model, or what is wrong with it.
    """

    name: str
    kind: str
    size_bytes: int
    family: str | None = None
    components: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA or LoCon file.

    Attributes:
        name: its path relative to the root.
        parts: what it changes: ``denoiser``, ``text encoder``, ``second text encoder``.
        layers: the number of weights that it changes.
        rank: the greatest rank of its factors.
    """

    name: str
    size_bytes: int
    parts: tuple[str, ...]
    layers: int
    rank: int


@dataclass(frozen=True)
class BundleEntry:
    """A bundle, or what is wrong with it."""

    name: str
    family: str | None = None
    components: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Listing:
    """Looks below a root, whose real path it is given, and remembers files that did not change."""

    root: Path
    _known: dict[tuple[str, int, int], Source | AdapterFile] = field(default_factory=dict)

    def sources(self) -> list[Source]:
        """Single files and diffusers folders, by name."""
        return [one for one in self._models() if isinstance(one, Source)]

    def adapters(self) -> list[AdapterFile]:
        """Files that ``--lora`` takes, by name."""
        return [one for one in self._models() if isinstance(one, AdapterFile)]

    def bundles(self) -> list[BundleEntry]:
        """Folders that export, adopt or pack wrote, by name."""
        return [_bundle(path, self._name(path)) for path in self._walk() if is_bundle(path)]

    def source(self, path: Path) -> Source | AdapterFile:
        """What one file or folder below the root is."""
        return self._folder(path) if path.is_dir() else self._file(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _models(self) -> Iterator[Source | AdapterFile]:
        found = (path for path in self._walk() if not is_bundle(path))
        for path, _ in zip(found, range(MOST), strict=False):
            yield self.source(path)

    def _walk(self) -> Iterator[Path]:
        """Bundles, diffusers folders and safetensors files; follows no link, enters no model."""
        yield from _below(self.root, DEPTH)

    def _file(self, path: Path) -> Source | AdapterFile:
        try:
            state = path.stat()
        except FileNotFoundError:  # moved since the folder was read
            return Source(self._name(path), "file", 0, error="the file is gone")
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in self._known:
            self._known = {old: one for old, one in self._known.items() if old[0] != key[0]}
            self._known[key] = _file(path, self._name(path), state.st_size)
        return self._known[key]

    def _folder(self, path: Path) -> Source:
        name = self._name(path)
        try:
            names.check_links(path, self.root)
        except PathError as error:
            return Source(name, "folder", 0, error=error.message)
        files = (file for file in path.rglob("*") if file.is_file())
        return _opened(path, name, "folder", sum(file.stat().st_size for file in files))


def is_bundle(path: Path) -> bool:
    """Whether export, adopt or pack wrote this folder, or is about to."""
    return (path / MANIFEST).is_file() or (path / LOCK).is_file()


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if not os.access(folder, os.R_OK | os.X_OK):
        return  # nothing in it could be exported either
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith(".") or not entry.name.isprintable() or entry.is_symlink():
            continue
        if entry.is_file():
            if entry.name.endswith(".safetensors"):
                yield path
        elif entry.is_dir():
            if is_bundle(path) or (path / INDEX).is_file():
                yield path
            elif depth > 1:
                yield from _below(path, depth - 1)


def _file(path: Path, name: str, size_bytes: int) -> Source | AdapterFile:
    try:
        return _adapter(path, name, size_bytes)
    except WeightsError:  # of no adapter: then it is a model, or says itself what it is
        return _opened(path, name, "file", size_bytes)


def _adapter(path: Path, name: str, size_bytes: int) -> AdapterFile:
    found = adapter_files.read(path)
    parts = {one.part: one.part.value for one in found}
    ranks = max(one.rank for one in found)
    return AdapterFile(name, size_bytes, tuple(parts.values()), len(found), ranks)


def _opened(path: Path, name: str, kind: str, size_bytes: int) -> Source:
    try:
        opened = open_source(str(path))
    except SdoptError as error:
        text = ": ".join(filter(None, (error.message, error.why)))
        return Source(name, kind, size_bytes, error=names.shown(text))
    except OSError as error:  # not ours to read
        return Source(name, kind, size_bytes, error=error.strerror or str(error))
    return Source(
        name,
        kind,
        size_bytes,
        opened.family,
        tuple(opened.component_names()),
        opened.lacking(),
        opened.notes,
    )


def _bundle(path: Path, name: str) -> BundleEntry:
    try:
        found = Bundle.open(path)
    except SdoptError as error:
        return BundleEntry(name, error=error.message)
    return BundleEntry(name, found.manifest.family, found.components)
