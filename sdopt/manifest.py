"""``manifest.json`` and the record in each stage's ONNX metadata, as dataclasses."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sdopt import reading
from sdopt.errors import BundleError

SCHEMA = 1
"""Raised whenever an older sdopt could misread what a newer one wrote."""

RECORD_KEY = "sdopt.record"

_NAME = re.compile(r"\w[\w.-]{0,99}")
_FILE_NAME = re.compile(r"[^\0/]{1,200}")


@dataclass(frozen=True)
class Step:
    """One pass in a stage's history: the text it was parsed from, how exact it is, what it means.

    ``numerics`` and ``intent`` are values of the enumerations in ``sdopt.tolerance``; ``reads``
    are digests of the files that the text names: the same text with other files is another step.
    """

    spec: str
    numerics: str
    changed: bool = True
    intent: str = "same"
    reads: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: dict[str, Any]) -> Step:
        """A step from the JSON object of a record; one of an older sdopt has no digests."""
        found = reading.fields(cls, data)
        return cls(**{**found, "reads": tuple(found.get("reads", ()))})


@dataclass(frozen=True)
class StageRecord:
    """Where a stage came from, kept in the ONNX file itself.

    ``source`` is the digest of the stage it was made from, or the fingerprint of the checkpoint;
    ``history`` holds every pass since export; ``key`` is a digest of all that decides the result.
    """

    component: str
    role: str
    stage: str
    source_stage: str
    source: str
    origin: str
    family: str
    dtype: str
    key: str
    history: tuple[Step, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def dumps(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def loads(cls, text: str, where: str) -> StageRecord:
        """Read a record.

        Raises:
            BundleError: unreadable, or written by a newer sdopt.
        """
        data = read_object(text, where)
        try:
            history = tuple(map(Step.of, data.pop("history")))
            return cls(**reading.fields(cls, data), history=history)
        except (KeyError, TypeError) as error:
            raise _unreadable(where, error) from error


@dataclass(frozen=True)
class ComponentEntry:
    """Where a component lives: ``folder`` under the bundle, ``prefix`` of its file names there."""

    folder: str
    role: str
    prefix: str = ""

    def __post_init__(self) -> None:
        """Refuse a place outside the bundle, which only a forged manifest names."""
        parts = PurePosixPath(self.folder).parts
        if ".." in parts or self.folder.startswith("/") or "/" in self.prefix:
            raise ValueError(f"the folder {self.folder!r} leaves the bundle")
        if not all(_FILE_NAME.fullmatch(part) for part in (*parts, f"{self.prefix}x")):
            raise ValueError(f"no folder is called {self.folder[:80]!r}, or no file so")


@dataclass(frozen=True)
class Manifest:
    """The index of a bundle; all of it can be rebuilt from the stages' records."""

    origin: str
    family: str
    components: dict[str, ComponentEntry]
    sdopt: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Refuse components whose names are none: ``pack`` calls their folders so."""
        if wrong := [name for name in self.components if not _NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0][:80]!r} is no name of a component")

    def dumps(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str, where: str) -> Manifest:
        """Read a manifest.

        Raises:
            BundleError: unreadable, or written by a newer sdopt.
        """
        data = read_object(text, where)
        try:
            entries = {
                name: ComponentEntry(**reading.fields(ComponentEntry, entry))
                for name, entry in data.pop("components").items()
            }
            return cls(**reading.fields(cls, data), components=entries)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(where, error) from error


def read_object(text: str, where: str) -> dict[str, Any]:
    """JSON text as a dict, its schema number checked before anything else is believed."""
    try:
        data = reading.table(text)
    except ValueError as error:
        raise _unreadable(where, error) from error
    schema = data.get("schema", 0)
    if not isinstance(schema, int):
        raise _unreadable(where, TypeError(f"its schema is {str(schema)[:80]}"))
    if schema > SCHEMA:
        raise BundleError(
            "this bundle was written by a newer sdopt",
            where=where,
            why=f"its schema is {schema}; this sdopt reads up to {SCHEMA}",
            hint="upgrade: pip install -U sdopt",
        )
    return data


def _unreadable(where: str, error: Exception) -> BundleError:
    return BundleError(
        "this record cannot be read",
        where=where,
        why=f"{type(error).__name__}: {error}",
        hint="export again, or restore the file; a lost manifest.json is rebuilt by itself",
    )
