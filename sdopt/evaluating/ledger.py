"""An append-only file of JSON lines that a kill at any moment leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdopt.errors import BundleError, storage_error


class Ledger:
    """Lines that are there for good once ``append`` has returned.

    A line that a kill cut off has no end mark: it is removed when the file is opened.

    Attributes:
        path: the file; made when the first line comes.
        lines: what it held when it was opened, and what came since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if not path.is_file():
            return
        try:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)
        except OSError as error:
            raise storage_error(error, f"read {path.name}") from error
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self.lines.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise BundleError(
                    "this line of a record of finished work is damaged",
                    where=f"{path}, line {number}",
                    why=str(error),
                    hint="remove the line: what it told of is looked at again",
                ) from error

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines and see them on the disk.

        Raises:
            StorageError: the disk is full or the file cannot be written.
        """
        new = [dict(line) for line in lines]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, f"write {self.path.name}") from error
        self.lines += new
