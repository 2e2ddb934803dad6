"""Compiled artifacts beside the graph they came from: written whole or not at all, known again.

An artifact is one file (``trt_rtx.plan``) with a record beside it (``trt_rtx.plan.json``) that
says which graph, target and compiler made it. A build is skipped only where the record says the
same as what would be built now, and the file is still the one that was recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdopt import datafile, reading
from sdopt.errors import storage_error

CHUNK = 1 << 20
"""Bytes of an artifact that are hashed at a time."""

_SCRATCH = ".scratch-"


@dataclass(frozen=True)
class Artifact:
    """One compiled file.

    Attributes:
        file: its path.
        key: digest of what decides it: graph, target's spec, versions, sizes.
        digest: of its own bytes.
        size: in bytes.
        seconds: that the compiler took.
        versions: of what made it.
        facts: what the compiler said of it (fused attentions, layers, profiles).
    """

    file: str
    key: str
    digest: str
    size: int
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def record_path(path: Path) -> Path:
    """Where the record of the artifact at ``path`` lies."""
    return path.with_name(f"{path.name}.json")


def known(path: Path, key: str) -> Artifact | None:
    """The artifact at ``path`` if it was made from what ``key`` stands for and is whole."""
    found = recorded(path)
    same = found is not None and found.key == key
    return found if same and found is not None and found.digest == digest_of(path) else None


def recorded(path: Path) -> Artifact | None:
    """What the record beside the artifact at ``path`` says, if there is one of a file its size."""
    record = record_path(path)
    if not path.is_file() or not record.is_file():
        return None
    try:
        found = Artifact(**reading.fields(Artifact, reading.table(record.read_bytes())))
    except (ValueError, TypeError):  # cut short or of another version: as if there were none
        return None
    return found if found.size == path.stat().st_size else None


def under(folder: Path) -> list[tuple[Path, Artifact]]:
    """Every artifact with a record below a folder; the bytes are not read."""
    paths = (path.with_suffix("") for path in sorted(folder.rglob("*.json")))
    found = ((path, recorded(path)) for path in paths)
    return [(path, one) for path, one in found if one is not None]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A scratch folder beside ``path`` for a compiler to write into; gone in any case afterwards.

    Nothing is under ``path`` but what was there before until ``commit``.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    folder = path.with_name(f".{path.name}{_SCRATCH}{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise storage_error(error, f"write {path.name}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tidy(path: Path) -> None:
    """Remove scratch folders of builds of ``path`` that were killed; call it under the lock."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}{_SCRATCH}*"):
        shutil.rmtree(folder, ignore_errors=True)


def commit(
    made: Path,
    path: Path,
    key: str,
    seconds: float,
    versions: dict[str, str],
    facts: dict[str, Any],
) -> Artifact:
    """Give a finished file its name by one rename, and write its record.

    Raises:
        StorageError: the folder is not writable or full.
    """
    artifact = Artifact(
        path.name, key, digest_of(made), made.stat().st_size, seconds, versions, facts
    )
    try:
        record_path(path).unlink(missing_ok=True)
        os.replace(made, path)
    except OSError as error:
        raise storage_error(error, f"write {path.name}") from error
    text = json.dumps(dataclasses.asdict(artifact), indent=2, sort_keys=True) + "\n"
    datafile.write_bytes(record_path(path), text.encode())
    return artifact


def digest_of(path: Path) -> str:
    """A digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()[:16]
