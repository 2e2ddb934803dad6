"""A bundle: components times stages in one directory, each stage committed by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdopt import companions, datafile, modelfile, reading, stage_report
from sdopt.errors import BundleError, UnknownNameError, UsageError
from sdopt.manifest import RECORD_KEY, ComponentEntry, Manifest, StageRecord
from sdopt.spec import suggest

MANIFEST = "manifest.json"
LOCK = ".sdopt.lock"
"""The file that a writer holds; it is there before the manifest is."""
JOBS = ".jobs"
"""Of ``sdopt ui``: what it was asked to do with a bundle, kept in the bundle and no part of it."""
RAW = "model"
"""The stage that export writes; its file is ``model.onnx``, where every tool looks for it."""
OPTIMIZED = "optimized"


@dataclass(frozen=True)
class Stage:
    """One committed graph of one component."""

    component: str
    name: str
    path: Path
    digest: str
    record: StageRecord

    def load(self) -> ir.Model:
        """The graph with its companions attached, their weights left on disk."""
        return modelfile.load(self.path)


class Bundle:
    """A directory of components, each with stages side by side."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle; a lost manifest is rebuilt from the stages.

        Raises:
            BundleError: no bundle there, or one written by a newer sdopt.
        """
        root = Path(path)
        file = root / MANIFEST
        if file.is_file():
            return cls(root, Manifest.loads(_text(file), str(file)))
        if root.is_dir() and (manifest := _rebuild(root)) is not None:
            return cls(root, manifest)
        raise BundleError(
            "there is no sdopt bundle here",
            where=str(root),
            why=f"no {MANIFEST} and no component folder with a stage",
            hint="make one with: sdopt export SOURCE -o BUNDLE",
        )

    @classmethod
    def create(
        cls, path: Path, origin: str, family: str, components: dict[str, ComponentEntry], by: str
    ) -> Bundle:
        """Make the directory, or add components to the bundle that is there."""
        path.mkdir(parents=True, exist_ok=True)
        known = cls.open(path).manifest.components if (path / MANIFEST).is_file() else {}
        return cls(path, Manifest(origin, family, {**known, **components}, sdopt=by))

    def write_manifest(self) -> None:
        """Put the manifest on disk, whole or not at all."""
        datafile.write_bytes(self.path / MANIFEST, self.manifest.dumps().encode())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the bundle for writing; another writer is told so instead of being mixed up with.

        Raises:
            BundleError: another sdopt is writing to it.
        """
        handle = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BundleError(
                    "another sdopt is writing to this bundle",
                    where=str(self.path),
                    hint="wait for it to end, or use another bundle (sdopt pack makes a copy)",
                ) from error
            yield
        finally:
            os.close(handle)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the manifest's order."""
        return tuple(self.manifest.components)

    def entry(self, component: str) -> ComponentEntry:
        """Where a component lives.

        Raises:
            UnknownNameError: no such component, with those there are.
        """
        try:
            return self.manifest.components[component]
        except KeyError:
            raise UnknownNameError(
                f"this bundle has no component {component!r}",
                where=str(self.path),
                hint=suggest(component, self.manifest.components)
                or "export it: sdopt export SOURCE -o BUNDLE --component " + component,
            ) from None

    def folder(self, component: str) -> Path:
        """The folder that a component's files lie in.

        Raises:
            BundleError: it is a link out of the bundle.
        """
        folder = self.path / self.entry(component).folder
        root = os.path.join(os.path.realpath(self.path), "")
        if not os.path.join(os.path.realpath(folder), "").startswith(root):
            raise BundleError(
                f"the folder of {component} is a link out of the bundle",
                where=str(folder),
                why="what is written into a bundle stays in it",
                hint="put the folder itself there",
            )
        return folder

    def file(self, component: str, stage: str) -> Path:
        """The ONNX file of a stage, whether it exists or not."""
        return self.folder(component) / f"{self.entry(component).prefix}{stage}.onnx"

    def stages(self, component: str) -> tuple[str, ...]:
        """Names of the stages of a component that are on disk, the raw one first."""
        prefix = self.entry(component).prefix
        others = [e.prefix for e in self.manifest.components.values() if e.prefix != prefix]
        names = [
            path.stem.removeprefix(prefix)
            for path in self.folder(component).glob(f"{glob.escape(prefix)}*.onnx")
            if not any(p and path.name.startswith(p) for p in others)
            and not companions.is_file_name(path.name)
        ]
        return tuple(sorted(names, key=lambda name: (name != RAW, name)))

    def stage(self, component: str, name: str) -> Stage:
        """A stage of a component, with its record.

        Raises:
            UnknownNameError: the component has no such stage.
            BundleError: the file holds no record of sdopt.
        """
        path = self.file(component, name)
        if not path.is_file():
            raise UnknownNameError(
                f"{component} has no stage {name!r}",
                where=str(path),
                hint=suggest(name, self.stages(component))
                or f"export it: sdopt export SOURCE -o {self.path} --component {component}",
            )
        record = read_record(path)
        if record is None:
            raise BundleError(
                "this ONNX file was not written by sdopt",
                where=str(path),
                hint="use it as a single file: sdopt optimize FILE.onnx -o OUT.onnx --passes ...",
            )
        return Stage(component, name, path, modelfile.digest_of(path.read_bytes()), record)

    def current(self, component: str, *preferred: str) -> Stage:
        """The first of the preferred stages that exists, else the raw one."""
        known = self.stages(component)
        return self.stage(component, next((n for n in preferred if n in known), RAW))

    def is_stale(self, stage: Stage) -> bool:
        """Whether the stage that this one was made from has changed since."""
        source, component = stage.record.source_stage, stage.component
        if source not in self.stages(component):
            return False
        return self.stage(component, source).digest != stage.record.source

    def config(self, component: str) -> dict[str, Any]:
        """The component's ``config.json`` as a dict, empty if there is none.

        Raises:
            BundleError: it cannot be read or holds no table.
        """
        path = self.folder(component) / "config.json"
        if not path.is_file():
            return {}
        try:
            return reading.table(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BundleError(
                f"the configuration of {component} cannot be read",
                where=str(path),
                why=str(error),
                hint="export the component again, or restore the file",
            ) from error

    def commit(self, model: ir.Model, record: StageRecord) -> tuple[Stage, int]:
        """Write a stage; returns it and the bytes of new weights.

        The rename of ``<stage>.onnx`` is the commit: before it the previous stage is whole, after
        it the new one is. Data files and companions that no stage uses any more are removed
        afterwards, and so is the report of what the stage was. Call it under ``lock``.
        """
        path = self.file(record.component, record.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.metadata_props[RECORD_KEY] = record.dumps()
        saved = modelfile.save(model, path)
        modelfile.remove_orphans(path)
        stage_report.remove_orphans(path)
        stage = Stage(record.component, record.stage, path, saved.digest, record)
        return stage, saved.bytes_written


def is_vacant(folder: Path) -> bool:
    """Whether a bundle may be made in a folder: nothing is in it, or nothing but jobs."""
    return all(one.name == JOBS for one in folder.iterdir())


def check_stage_name(name: str) -> None:
    """See that a stage can be called so.

    Raises:
        UsageError: it is the raw one's, or no file could have it.
    """
    if name == RAW:
        raise UsageError(
            f"the stage {name!r} cannot be written",
            why="a stage is made from another one; the raw one is what export wrote",
            hint="choose another name",
        )
    if not re.fullmatch(r"\w[\w.-]*", name) or companions.is_file_name(f"{name}.onnx"):
        raise UsageError(
            f"{name!r} is no name for a stage",
            hint="use letters, digits, dots, dashes and underscores",
        )


def _text(path: Path) -> str:
    """What is no UTF-8 in a manifest is no JSON either, and read_object says so."""
    return path.read_bytes().decode("utf-8", "replace")


def read_record(path: Path) -> StageRecord | None:
    """The record in an ONNX file's metadata, or None if it has none."""
    text = modelfile.metadata(path).get(RECORD_KEY)
    return StageRecord.loads(text, str(path)) if text else None


def _rebuild(root: Path) -> Manifest | None:
    entries: dict[str, ComponentEntry] = {}
    origin = family = ""
    for path in sorted(root.glob("*/*.onnx")):
        if companions.is_file_name(path.name):
            continue
        record = read_record(path)
        if record is None or not path.stem.endswith(record.stage):
            continue
        prefix = path.stem.removesuffix(record.stage)
        folder = str(path.parent.relative_to(root))
        entries.setdefault(record.component, ComponentEntry(folder, record.role, prefix))
        origin, family = record.origin, record.family
    return Manifest(origin, family, entries) if entries else None
