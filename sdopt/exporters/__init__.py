"""Sources to canonical graphs: diffusers folders and Hugging Face Hub ids. Imports no torch."""

from __future__ import annotations

from sdopt.exporters.diffusers import DiffusersSource, Exported
from sdopt.exporters.hub import resolve
from sdopt.exporters.tokenizer import SharedFile

__all__ = ["DiffusersSource", "Exported", "SharedFile", "open_source", "resolve"]


def open_source(
    source: str, dtype: str | None = None, components: list[str] | None = None
) -> DiffusersSource:
    """Open a local diffusers folder or a Hub id, fetching what is needed of the latter.

    Raises:
        SourceError: it is not there, not reachable, or not of a supported kind.
    """
    return DiffusersSource(resolve(source, dtype, components))
