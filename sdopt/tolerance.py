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


@dataclass(frozen=True)
class Tolerance:
    """The largest relative L2 distance ``||a - b|| / ||b||`` that counts as the same.

    ``relative_l2`` is None where only quality can be judged (token merging, say).
    """

    relative_l2: float | None
    reason: str


FP32_REASSOCIATED = 5e-6
"""Relative L2 that reordered fp32 sums of a UNet stay under; a wrong attention scale does not."""

HALF = {"float16": 5e-3, "bfloat16": 4e-2}
"""Relative L2 allowed when either side computes in that type."""


def between(numerics: Iterable[Numerics], dtypes: Iterable[str]) -> Tolerance:
    """The tolerance of comparing two graphs with those passes between them.

    Args:
        numerics: of every pass that only one of the two went through.
        dtypes: names of the floating types either graph computes in (``float16``, ...).
    """
    worst = set(numerics)
    half = [HALF[name] for name in set(dtypes) if name in HALF]
    if half:
        return Tolerance(max(half), "one side computes in half precision")
    if Numerics.LOSSY in worst:
        return Tolerance(None, "a lossy pass lies between them: judge the images")
    if Numerics.REASSOCIATED in worst:
        return Tolerance(FP32_REASSOCIATED, "the same sums in another order, in fp32")
    return Tolerance(0.0, "exact passes only")
