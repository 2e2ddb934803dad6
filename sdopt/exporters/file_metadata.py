"""What a single file says of itself in its metadata, beside its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt import reading
from sdopt.errors import SourceError

METADATA = "sdopt"
"""The key in a file's metadata under which it carries what its weights do not say: JSON with
``configs`` (by folder, what replaces the published values) and ``files`` (path to text)."""

_FILE = re.compile(r"(tokenizer|tokenizer_2|scheduler)/\w[\w.-]*\.(json|txt)")


def metadata_of(header: bytes) -> dict[str, Any]:
    """The metadata table of a safetensors header."""
    found = reading.table(header).get("__metadata__")
    return found if isinstance(found, dict) else {}


def hints_of(metadata: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """What a file carries for sdopt: configurations by folder, and small text files."""
    text = metadata.get(METADATA)
    table = table_of(text, path) if isinstance(text, str) else {}
    configs, files = table.get("configs", {}), table.get("files", {})
    fits = isinstance(configs, dict) and isinstance(files, dict)
    if not fits or not all(
        _FILE.fullmatch(str(name)) and isinstance(one, str) for name, one in files.items()
    ):
        raise SourceError(
            f"the file's metadata {METADATA!r} cannot be used",
            where=str(path),
            why="configs: a table by folder; files: text by tokenizer/NAME or scheduler/NAME",
        )
    return {"configs": configs, "files": files}


def table_of(text: str, path: Path) -> dict[str, Any]:
    """JSON text in a file's metadata that holds a table.

    Raises:
        SourceError: it does not.
    """
    try:
        return reading.table(text)
    except ValueError as error:
        raise SourceError(
            "the file's metadata holds broken JSON", where=str(path), why=str(error)
        ) from error
