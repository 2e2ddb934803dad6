"""Sources to canonical graphs: diffusers folders, single files, Hub ids. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdopt.exporters.diffusers import DiffusersSource
from sdopt.exporters.hub import is_single_file, resolve
from sdopt.exporters.single_file import SingleFileSource
from sdopt.exporters.source import Exported, Source
from sdopt.exporters.tokenizer import SharedFile

__all__ = [
    "DiffusersSource",
    "Exported",
    "SharedFile",
    "SingleFileSource",
    "Source",
    "open_source",
    "resolve",
]


def open_source(
    source: str,
    dtype: str | None = None,
    components: Sequence[str] | None = None,
    supplied: Mapping[str, str | Path] | None = None,
) -> Source:
    """Open a local diffusers folder, a single file, or a Hub id, of which the needed files come.

    ``supplied`` are folders of parts that replace the source's own or that it lacks, by the
    part's folder in a pipeline (``text_encoder``, ``text_encoder_2``, ``vae``, ``tokenizer``,
    ``controlnet``); each may be the part's own folder or a whole pipeline's, a ControlNet also a
    file or a Hub id.

    Raises:
        SourceError: it is not there, not reachable, or not of a supported kind; says which.
    """
    given = {part: _home(part, folder, dtype) for part, folder in (supplied or {}).items()}
    if is_single_file(source):
        return SingleFileSource(Path(source).expanduser(), given, components)
    return DiffusersSource(resolve(source, dtype, components), given)


def _home(part: str, given: str | Path, dtype: str | None) -> Path:
    folder = Path(given).expanduser()
    if part == "controlnet" and not folder.exists():  # these lie in repositories of their own
        return resolve(str(given), dtype, [part])
    return folder / part if (folder / part / "config.json").is_file() else folder
