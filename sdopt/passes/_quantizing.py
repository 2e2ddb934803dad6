"""Weights as small integers or 8-bit floats with scales, both computed while they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import weights
from sdopt.errors import WeightsError

_STEP_BYTES = 4 << 20
"""Of float32 held at once; the arithmetic makes a few arrays of that size."""

TOPS = {ir.DataType.INT8: 127, ir.DataType.INT4: 7, ir.DataType.FLOAT8E4M3FN: 448}


@dataclass(frozen=True)
class Grid:
    """How the numbers of a weight share scales: ``weight = integer * scale``, symmetric around 0.

    Attributes:
        dtype: INT8 (-127 to 127) or INT4 (-7 to 7); the lowest number stays unused, so that the
            grid is symmetric. Or FLOAT8E4M3FN (-448 to 448), whose steps grow with the number.
        axis: with ``block`` 0 the axis of the output channels, each of which has a scale; else
            the axis that the layer sums over, along which ``block`` numbers share a scale.
        block: see ``axis``; as ``block_size`` of DequantizeLinear, the last block may be shorter.
    """

    dtype: ir.DataType
    axis: int
    block: int = 0

    @property
    def top(self) -> int:
        """The largest number."""
        return TOPS[self.dtype]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight of that shape."""
        if not self.block:
            return (shape[self.axis],)
        count = -(-shape[self.axis] // self.block)
        return (*shape[: self.axis], count, *shape[self.axis + 1 :])


def quantize(weight: ir.TensorProtocol, grid: Grid) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """The integers and the scales of ``weight``, both lazy; no byte of it is read here.

    The scales are in the weight's dtype, and the integers are rounded (half to even, as ONNX's
    QuantizeLinear) with the scales as that dtype holds them.
    """
    shape = tuple(int(size) for size in weight.shape.numpy())
    recipe = _Recipe(weight, grid, shape)
    name = weight.name or ""
    integers = weights.BlockTensor(
        recipe.integers, grid.dtype, shape, f"{name}.integers", recipe.of("integers")
    )
    scales = weights.BlockTensor(
        recipe.scales, weight.dtype, grid.scale_shape(shape), f"{name}.scales", recipe.of("scales")
    )
    return integers, scales


@dataclass(frozen=True)
class _Recipe:
    weight: ir.TensorProtocol
    grid: Grid
    shape: tuple[int, ...]

    def of(self, part: str) -> weights.Recipe:
        """What a stage records of the integers or the scales."""
        grid = self.grid
        options = (("part", part), ("to", int(grid.dtype)), ("axis", grid.axis))
        return weights.Recipe("quantize", (self.weight,), (*options, ("block", grid.block)))

    def scales(self) -> weights.Blocks:
        """Flat, in order; a pass over the weight of their own."""
        if not self._is_local:
            yield self._whole()
            return
        for chunk in self._chunks():
            yield self._rounded(self._largest(np.abs(chunk))).reshape(-1)

    def integers(self) -> weights.Blocks:
        """Flat, in order."""
        kind, top = self.grid.dtype.numpy(), self.grid.top
        whole = None if self._is_local else self._whole()
        for chunk in self._chunks():
            scale = self._rounded(self._largest(np.abs(chunk))) if whole is None else whole
            chunk /= self._spread(scale, chunk.shape)
            np.clip(chunk, -top, top, out=chunk)
            if self.grid.dtype != ir.DataType.FLOAT8E4M3FN:
                chunk = np.rint(chunk).astype(np.int8)
            yield chunk.astype(kind).reshape(-1)

    @property
    def _is_local(self) -> bool:
        """Whether a scale is known from the rows of axis 0 that it is for."""
        return bool(self.grid.block) or self.grid.axis == 0

    def _whole(self) -> np.ndarray:
        """A scale per index of an axis behind the first: every row has a part of each."""
        others = tuple(i for i in range(len(self.shape)) if i != self.grid.axis)
        top = np.zeros(self.shape[self.grid.axis], np.float32)
        for chunk in self._chunks():
            np.maximum(top, np.abs(chunk).max(axis=others), out=top)
        return self._rounded(top)

    def _chunks(self) -> Iterator[np.ndarray]:
        """Whole rows of axis 0 (whole blocks of rows), ``[rows, ...]`` in float32."""
        columns = math.prod(self.shape[1:])
        if not columns or not self.shape[0]:
            return
        group = self.grid.block if self.grid.block and self.grid.axis == 0 else 1
        rows = max(1, _STEP_BYTES // (4 * columns * group)) * group
        for block in weights.rechunk(weights.read_blocks(self.weight), rows * columns):
            chunk = np.array(block, np.float32).reshape(-1, *self.shape[1:])
            if not np.isfinite(chunk).all():
                raise WeightsError(
                    f"{self.weight.name}: it holds inf or NaN, which no integer stands for",
                    hint="leave its layer out: quantize=...:keep=MODULE",
                )
            yield chunk

    def _largest(self, chunk: np.ndarray) -> np.ndarray:
        """The largest of each channel or block of a chunk of magnitudes."""
        axis, block = self.grid.axis, self.grid.block
        rows: np.ndarray = chunk if block else chunk.reshape(len(chunk), -1)
        starts = np.arange(0, rows.shape[axis], block) if block else np.arange(1)
        largest: np.ndarray = np.maximum.reduceat(rows, starts, axis=axis if block else 1)
        return largest

    def _rounded(self, largest: np.ndarray) -> np.ndarray:
        """Scales in the weight's dtype; 1 where all is zero, or too small for that dtype."""
        scale = (largest / np.float32(self.grid.top)).astype(self.weight.dtype.numpy())
        return np.where(scale == 0, np.ones_like(scale), scale)

    def _spread(self, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The scale of every element, in a shape that broadcasts."""
        wide = scale.astype(np.float32)
        if self.grid.block:
            wide = np.repeat(wide, self.grid.block, axis=self.grid.axis)
            return np.take(wide, range(shape[self.grid.axis]), axis=self.grid.axis)
        return wide.reshape([-1 if i == self.grid.axis else 1 for i in range(len(shape))])
