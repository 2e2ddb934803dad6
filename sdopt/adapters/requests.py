"""The adapters that a run asks for: each file with its strength, read once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdopt.adapters import files
from sdopt.errors import UsageError
from sdopt.reading import user_path

Asked = str | Path | tuple[str | Path, float]
"""``FILE``, ``FILE:scale``, or both apart."""


@dataclass(frozen=True)
class Lora:
    """An adapter file at a strength; ``digest`` is that of the file's bytes."""

    path: Path
    scale: float
    digest: str
    adapters: tuple[files.Adapter, ...]

    def __str__(self) -> str:
        return f"{self.path.name} ({self.digest}) at {self.scale:g}"


def read(asked: Iterable[Asked]) -> tuple[Lora, ...]:
    """The adapters asked for, their files' headers read.

    Raises:
        UsageError: a scale that is no finite number, or one file twice.
        WeightsError: a file that is missing, or holds no adapter that can be added up.
    """
    if isinstance(asked, str | Path):
        raise UsageError("loras is a list", hint=f"loras=[{str(asked)!r}]")
    found: dict[str, Lora] = {}
    for one in asked:
        path, scale = _parts(one)
        digest = files.digest_of(path)
        if digest in found:
            raise UsageError(
                "the same adapter is asked for twice",
                where=str(path),
                why=f"{found[digest].path} holds the same bytes",
                hint="give it once, at the sum of both scales",
            )
        found[digest] = Lora(path, scale, digest, tuple(files.read(path)))
    return tuple(found.values())


def _parts(asked: Asked) -> tuple[Path, float]:
    if isinstance(asked, tuple):
        path, scale = Path(asked[0]), float(asked[1])
    else:
        path, scale = _split(str(asked))
    if not math.isfinite(scale):
        raise UsageError(f"the scale of an adapter must be a number, not {scale}", where=str(path))
    return user_path(path), scale


def _split(text: str) -> tuple[Path, float]:
    """``style.safetensors:0.8``; what stands behind the last colon is a scale or of the name."""
    name, colon, number = text.rpartition(":")
    if not colon or user_path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(name), float(number)
    except ValueError as error:
        raise UsageError(
            f"{number!r} is no scale for an adapter",
            where=text,
            hint="write FILE:0.8, a number behind the colon",
        ) from error
