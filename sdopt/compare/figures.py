"""How far two arrays are apart, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Figures:
    """One output of ``a`` against the same of ``b``, the reference.

    Attributes:
        name: of the output.
        shape: of both, or of the reference where ``shape_a`` is there.
        max_abs: the largest ``|a - b|``.
        relative_l2: ``||a - b|| / ||b||``; infinite where only the reference is all zeros.
        cosine: of the angle between them; 1 for two arrays of zeros.
        psnr_db: ``20 log10(range of b / root mean square of a - b)``; infinite if they are equal.
        nan_a, nan_b, inf_a, inf_b: how many elements are no finite number; with one the other
            figures are NaN.
        shape_a: of ``a`` where that is another one: the arrays are then infinitely far apart.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative_l2: float
    cosine: float
    psnr_db: float
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0
    shape_a: tuple[int, ...] | None = None

    @property
    def finite(self) -> bool:
        """Whether every element on both sides is a finite number."""
        return not (self.nan_a or self.nan_b or self.inf_a or self.inf_b)

    def within(self, relative_l2: float) -> bool:
        """Whether they are that close; never with a NaN or an infinity in them."""
        return self.finite and self.relative_l2 <= relative_l2


def figures(name: str, a: np.ndarray, b: np.ndarray) -> Figures:
    """Measure ``a`` against ``b``, two arrays of one shape, in float64."""
    left, right = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    counts: dict[str, Any] = {
        "nan_a": int(np.isnan(left).sum()),
        "nan_b": int(np.isnan(right).sum()),
        "inf_a": int(np.isinf(left).sum()),
        "inf_b": int(np.isinf(right).sum()),
    }
    shape = tuple(int(size) for size in a.shape)
    if any(counts.values()) or not left.size:
        nothing = 0.0 if not left.size else float("nan")
        return Figures(name, shape, nothing, nothing, nothing, nothing, **counts)
    gap = left - right
    size_a, size_b, size_gap = (float(np.linalg.norm(one)) for one in (left, right, gap))
    return Figures(
        name,
        shape,
        max_abs=float(np.abs(gap).max()),
        relative_l2=_ratio(size_gap, size_b),
        cosine=_cosine(left, right, size_a, size_b),
        psnr_db=_psnr(right, size_gap),
        **counts,
    )


def figures_of_any(name: str, a: np.ndarray, b: np.ndarray) -> Figures:
    """``figures``, of two arrays that may differ in shape, as lists of boxes do."""
    if a.shape == b.shape:
        return figures(name, a, b)
    endless = float("inf")
    return Figures(name, b.shape, endless, endless, 0.0, -endless, shape_a=a.shape)


def worst(several: Sequence[Figures]) -> Figures:
    """The one of several samples of an output that is farthest off; what is no number is worst."""
    return max(several, key=lambda one: (not one.finite, one.relative_l2))


def _ratio(gap: float, reference: float) -> float:
    if gap == 0:
        return 0.0
    return gap / reference if reference else float("inf")


def _cosine(a: np.ndarray, b: np.ndarray, size_a: float, size_b: float) -> float:
    if not size_a or not size_b:
        return 1.0 if size_a == size_b else 0.0
    return float(np.clip(np.dot(a / size_a, b / size_b), -1.0, 1.0))


def _psnr(reference: np.ndarray, size_gap: float) -> float:
    if size_gap == 0:
        return float("inf")
    spread = float(reference.max() - reference.min())
    root_mean_square = size_gap / float(np.sqrt(reference.size))
    return 20 * float(np.log10(spread / root_mean_square)) if spread else float("-inf")


def plain(data: Any) -> Any:
    """Dicts and lists for JSON, which has no NaN and no infinity: these become None."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
