"""How exact a pass is, and what a comparison across passes may show."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Numerics(enum.Enum):
    """How far a pass may move the numbers."""

    EXACT = "exact"
    """Bit-equal on ONNX Runtime's CPU with optimisations off, at equal batch."""
    REASSOCIATED = "reassociated"
    """The same mathematics in another order of rounding."""
    LOSSY = "lossy"
    """Other mathematics, or fewer bits."""


class Intent(enum.Enum):
    """What a pass means to do to the function that a graph computes."""

    SAME = "same"
    """Compute the same; ``Numerics`` says how nearly."""
    CAST = "cast"
    """Compute the same in a smaller type: what is lost is what the type cannot hold."""
    OTHER = "other"
    """Compute something else on purpose, as a merged adapter does. ``Numerics`` then says how
    near it is to the same change made elsewhere, and nothing of how near it is to the original."""


@dataclass(frozen=True)
class Change:
    """What one pass that only one of two graphs went through may have done to the numbers."""

    name: str
    numerics: Numerics
    intent: Intent = Intent.SAME


@dataclass(frozen=True)
class Tolerance:
    """The largest relative L2 distance ``||a - b|| / ||b||`` that counts as the same.

    ``relative_l2`` is None where nothing can be judged by numbers (token merging, an adapter).
    """

    relative_l2: float | None
    reason: str


FP32_REASSOCIATED = 5e-6
"""Relative L2 that reordered fp32 sums of a UNet stay under; a wrong attention scale does not."""

HALF = {"float16": 5e-3, "bfloat16": 4e-2}
"""Relative L2 allowed when either side computes in that type."""


def between(changes: Iterable[Change], dtypes: Iterable[str]) -> Tolerance:
    """The tolerance of comparing two graphs with those passes between them.

    What a cast loses is what the types say, so it is judged by them; any other lossy pass, or a
    cast of which no half type is left to see, leaves nothing to judge by.

    Args:
        changes: of every pass that only one of the two went through.
        dtypes: names of the floating types either graph computes in (``float16``, ...).
    """
    found = list(changes)
    if others := dict.fromkeys(one.name for one in found if one.intent is Intent.OTHER):
        verb = "changes" if len(others) == 1 else "change"
        return Tolerance(None, f"{' and '.join(others)} {verb} what the model computes")
    half = [HALF[name] for name in set(dtypes) if name in HALF]
    lossy = [one for one in found if one.numerics is Numerics.LOSSY]
    if any(not half or one.intent is not Intent.CAST for one in lossy):
        return Tolerance(None, "a lossy pass lies between them: judge the images")
    if half:
        return Tolerance(max(half), "one side computes in half precision")
    if any(one.numerics is Numerics.REASSOCIATED for one in found):
        return Tolerance(FP32_REASSOCIATED, "the same sums in another order, in fp32")
    return Tolerance(0.0, "exact passes only")
