"""How far two arrays are apart, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 1 << 20
"""Elements that are widened to float64 at a time."""


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
    """Measure ``a`` against ``b``, two arrays of one shape, in float64, a block at a time."""
    shape = tuple(int(size) for size in a.shape)
    sums = _Sums()
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.size, _BLOCK):
        sums.add(flat_a[start : start + _BLOCK], flat_b[start : start + _BLOCK])
    counts: dict[str, Any] = {
        "nan_a": sums.nan_a,
        "nan_b": sums.nan_b,
        "inf_a": sums.inf_a,
        "inf_b": sums.inf_b,
    }
    if any(counts.values()) or not a.size:
        nothing = 0.0 if not a.size else float("nan")
        return Figures(name, shape, nothing, nothing, nothing, nothing, **counts)
    size_a, size_b, size_gap = (math.sqrt(one) for one in (sums.aa, sums.bb, sums.gap))
    return Figures(
        name,
        shape,
        max_abs=sums.max_abs,
        relative_l2=_ratio(size_gap, size_b),
        cosine=_cosine(sums.ab, size_a, size_b),
        psnr_db=_psnr(sums.high - sums.low, size_gap / math.sqrt(a.size)),
        **counts,
    )


@dataclass
class _Sums:
    """What is summed over the elements of two arrays; without meaning once one is not finite."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    gap: float = 0.0
    max_abs: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    nan_a: int = 0
    nan_b: int = 0
    inf_a: int = 0
    inf_b: int = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Count a block of both."""
        left, right = a.astype(np.float64), b.astype(np.float64)
        self.nan_a += int(np.isnan(left).sum())
        self.nan_b += int(np.isnan(right).sum())
        self.inf_a += int(np.isinf(left).sum())
        self.inf_b += int(np.isinf(right).sum())
        if self.nan_a or self.nan_b or self.inf_a or self.inf_b:
            return
        gap = left - right
        self.aa += float(left @ left)
        self.bb += float(right @ right)
        self.ab += float(left @ right)
        self.gap += float(gap @ gap)
        self.max_abs = max(self.max_abs, float(np.abs(gap).max()))
        self.low = min(self.low, float(right.min()))
        self.high = max(self.high, float(right.max()))


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


def _cosine(product: float, size_a: float, size_b: float) -> float:
    if not size_a or not size_b:
        return 1.0 if size_a == size_b else 0.0
    return min(1.0, max(-1.0, product / (size_a * size_b)))


def _psnr(spread: float, root_mean_square: float) -> float:
    if root_mean_square == 0:
        return float("inf")
    return 20 * math.log10(spread / root_mean_square) if spread else float("-inf")


def plain(data: Any) -> Any:
    """Dicts and lists for JSON, which has no NaN and no infinity: these become None."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
