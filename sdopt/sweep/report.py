"""Reads a sweep's folder and tells of it as a table or as data."""

from __future__ import annotations

from pathlib import Path

from sdopt.sweep.result import Result


def load(folder: str | Path) -> Result:
    """What a sweep has found so far, also while it runs.

    Raises:
        UsageError: there is no sweep in the folder.
    """
    raise NotImplementedError
