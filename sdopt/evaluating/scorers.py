"""What says how well an image shows its prompt: CLIP, or a function of the user's."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdopt.errors import UsageError
from sdopt.importing import module_of

if TYPE_CHECKING:
    from PIL.Image import Image

Function = Callable[[list[Any], list[str]], Sequence[float]]

_DIGITS = 16


class Scorer(Protocol):
    """Something that scores images; higher is better.

    Attributes:
        name: for people.
        digest: of what decides its scores, so that scores of another are not taken for its own.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above

    @property
    def digest(self) -> str: ...  # noqa: D102 - described above

    def score(self, images: list[Image], prompts: list[str]) -> list[float]:
        """One number per image, of the prompt at its place."""


@dataclass(frozen=True)
class FunctionScorer:
    """A Python function ``(images, prompts) -> scores``; what it is decided by is its file."""

    name: str
    digest: str
    function: Function

    def score(self, images: list[Image], prompts: list[str]) -> list[float]:
        """What the function says.

        Raises:
            UsageError: it failed, or gave something else than a finite number per image.
        """
        try:
            found = [float(one) for one in self.function(list(images), list(prompts))]
        except Exception as error:
            raise UsageError(
                "the scorer failed",
                where=self.name,
                why=f"{type(error).__name__}: {error}",
                hint=f"it was given {len(images)} images and as many prompts, "
                "and is to return as many numbers",
            ) from error
        if len(found) != len(images) or not all(map(math.isfinite, found)):
            raise UsageError(
                "the scorer gave no finite number per image",
                where=self.name,
                why=f"it gave {found[:4]}... ({len(found)}) for {len(images)} images",
            )
        return found


def load_function(text: str) -> FunctionScorer:
    """The function that ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` names.

    Raises:
        UsageError: there is none, or it cannot be imported.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier() or not place:
        raise UsageError(
            f"{text!r} names no function", hint="--scorer FILE.py:FUNCTION, or MODULE:FUNCTION"
        )
    try:
        module = module_of(place)
    except Exception as error:
        raise UsageError(
            "this scorer cannot be imported",
            where=place,
            why=f"{type(error).__name__}: {error}",
            hint="give a Python file, or a module whose folder is on PYTHONPATH",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(
            f"there is no function {name}",
            where=place,
            hint=f"it has {', '.join(known) or 'none'}",
        )
    source = module.__file__
    digest = hashlib.sha256(Path(source).read_bytes() if source else place.encode())
    digest.update(name.encode())
    label = f"{Path(place).name if place.endswith('.py') else place}:{name}"
    return FunctionScorer(label, digest.hexdigest()[:_DIGITS], function)
