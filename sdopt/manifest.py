"""``manifest.json`` and the record in each stage's ONNX metadata, as dataclasses."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sdopt.errors import BundleError

SCHEMA = 1
"""Raised whenever an older sdopt could misread what a newer one wrote."""

RECORD_KEY = "sdopt.record"


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
        return cls(**{**_known(cls, data), "reads": tuple(data.get("reads", ()))})


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
            return cls(**_known(cls, data), history=history)
        except (KeyError, TypeError, AttributeError) as error:
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


@dataclass(frozen=True)
class Manifest:
    """The index of a bundle; all of it can be rebuilt from the stages' records."""

    origin: str
    family: str
    components: dict[str, ComponentEntry]
    sdopt: str = ""
    schema: int = SCHEMA

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
                name: ComponentEntry(**_known(ComponentEntry, entry))
                for name, entry in data.pop("components").items()
            }
            return cls(**_known(cls, data), components=entries)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(where, error) from error


def read_object(text: str, where: str) -> dict[str, Any]:
    """JSON text as a dict, its schema number checked before anything else is believed."""
    try:
        data = json.loads(text)
        schema = data.get("schema", 0)
    except (json.JSONDecodeError, AttributeError) as error:
        raise _unreadable(where, error) from error
    if not isinstance(schema, int) or schema > SCHEMA:
        raise BundleError(
            "this bundle was written by a newer sdopt",
            where=where,
            why=f"its schema is {schema}; this sdopt reads up to {SCHEMA}",
            hint="upgrade: pip install -U sdopt",
        )
    return dict(data)


def _known(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Only the fields that ``cls`` has: a patch release may add fields without a new schema."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: value for key, value in data.items() if key in names}


def _unreadable(where: str, error: Exception) -> BundleError:
    return BundleError(
        "this record cannot be read",
        where=where,
        why=f"{type(error).__name__}: {error}",
        hint="export again, or restore the file; a lost manifest.json is rebuilt by itself",
    )
