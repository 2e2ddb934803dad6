"""The arithmetic of token merging as standard ONNX nodes: partition, match, merge, unmerge.

Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), whose code is ``tomesd``.
Every size comes from live shapes and every index from integer arithmetic whose products stay in
int32, since some compilers lower int64 to it. No NonZero and no ScatterElements with a reduction
(TensorRT-RTX refuses both): the mean is a product with a one-hot matrix, and the only scatters are
plain ones on index rows.

Letters in shapes: ``N = H * W`` tokens, of which ``D`` are destinations (one in each 2x2 cell) and
``S = N - D`` are sources; ``K`` sources are kept and ``R = S - K`` are merged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from sdopt.graph import FLOAT32_KEY, Emitter

PRIME = 32717
"""The hash's modulus: a product of residues is below 2**31, and cubing permutes them (2 mod 3)."""

TINY = 1e-12
"""Least norm that a token is divided by, so that an all-zero token gives no NaN."""


@dataclass(frozen=True)
class Partition:
    """Which tokens are sources and destinations at one resolution; all values are int64.

    Attributes:
        sources: token numbers ``[S]``.
        destinations: token numbers ``[D]``, cell by cell.
        order: for each token its place in sources, then destinations ``[N]``.
        kept: K as ``[1]`` and as a scalar.
        kept_places: places of the kept sources in a merged sequence ``[B, K]``.
        places: places of the destinations in a merged sequence ``[D, 1]`` and ``[B, D]``.
        token_base: number of each batch entry's first token ``[B, 1]``.
        merged_base: number of each batch entry's first merged token ``[B, 1]``.
    """

    sources: ir.Value
    destinations: ir.Value
    order: ir.Value
    kept: tuple[ir.Value, ir.Value]
    kept_places: ir.Value
    places: tuple[ir.Value, ir.Value]
    token_base: ir.Value
    merged_base: ir.Value


class _Typed:
    """An emitter that also notes the element type of what it makes, as later casts need it."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._constants: dict[int, ir.Value] = {}

    def __call__(
        self, op_type: str, *inputs: ir.Value | int, dtype: Any = ir.DataType.INT64, **attrs: Any
    ) -> ir.Value:
        values = [self.number(x) if isinstance(x, int) else x for x in inputs]
        out = self._emit(op_type, *values, **attrs)
        out.type = ir.TensorType(dtype)
        return out

    def number(self, number: int) -> ir.Value:
        if number not in self._constants:
            self._constants[number] = self._emit.const(number)
        return self._constants[number]

    def vector(self, *numbers: int) -> ir.Value:
        return self._emit.const(numbers)

    def real(self, op_type: str, *inputs: ir.Value | int, **attrs: Any) -> ir.Value:
        """A node that stays in fp32 when the graph is cast later."""
        out = self(op_type, *inputs, dtype=ir.DataType.FLOAT, **attrs)
        _stay(out)
        return out

    def top(self, value: ir.Value, count: ir.Value, **attrs: Any) -> tuple[ir.Value, ir.Value]:
        """TopK over the last axis of an fp32 value: numbers and indices."""
        best, index = self._emit.many("TopK", value, count, outputs=2, axis=-1, **attrs)
        best.type, index.type = (
            ir.TensorType(kind) for kind in (ir.DataType.FLOAT, ir.DataType.INT64)
        )
        _stay(best)
        return best, index

    def real_number(self, number: float) -> ir.Value:
        return self._emit.const(number, np.float32)


def _stay(value: ir.Value) -> None:
    node = value.producer()
    if node is not None:
        node.metadata_props[FLOAT32_KEY] = "similarities and means of merged tokens"


def partition(emit: Emitter, image: ir.Value, ratio: float, seed: int) -> Partition:
    """Nodes that split the tokens of ``image`` ``[B, C, H, W]`` into sources and destinations.

    R is ``int(N * ratio)`` with ``ratio`` to three decimals. Where H or W is odd, its last row or
    column lies in no cell and its tokens are sources, as in ``tomesd``.
    """
    make = _Typed(emit)
    share = Fraction(ratio).limit_denominator(1000)
    batch, height, width = (
        make("Squeeze", make("Shape", image, start=axis, end=axis + 1)) for axis in (0, 2, 3)
    )
    cell_rows, cell_cols = make("Div", height, 2), make("Div", width, 2)
    tokens, cells = make("Mul", height, width), make("Mul", cell_rows, cell_cols)
    n_sources = make("Sub", tokens, cells)
    merged = make("Div", make("Mul", tokens, share.numerator), share.denominator)
    kept = make("Sub", n_sources, merged)

    def token(cell: ir.Value, slot: ir.Value) -> ir.Value:
        """The number of the token in ``slot`` (0 to 3, row by row) of ``cell``."""
        row = make("Add", make("Mul", make("Div", cell, cell_cols), 2), make("Div", slot, 2))
        col = make("Add", make("Mul", make("Mod", cell, cell_cols), 2), make("Mod", slot, 2))
        return make("Add", make("Mul", row, width), col)

    cell = make("Range", 0, cells, 1)
    drawn = _draw(make, cell, seed)
    destinations = token(cell, drawn)

    # Sources are the three other slots of every cell, then the odd last row, then the odd column.
    rank = make("Range", 0, n_sources, 1)
    inside = make("Mul", cells, 3)
    own_cell, other = make("Div", rank, 3), make("Mod", rank, 3)
    taken = make("Gather", drawn, make("Min", own_cell, make("Sub", cells, 1)))
    after = make("GreaterOrEqual", other, taken, dtype=ir.DataType.BOOL)
    slot = make("Add", other, make("Cast", after, to=ir.DataType.INT64))
    rest = make("Sub", rank, inside)
    row_rest = make("Mul", make("Mod", height, 2), width)
    last_row = make("Add", rest, make("Mul", make("Sub", height, 1), width))
    nth = make("Add", make("Sub", rest, row_rest), 1)
    last_col = make("Sub", make("Mul", nth, width), 1)
    in_row = make("Less", rest, row_rest, dtype=ir.DataType.BOOL)
    outside = make("Where", in_row, last_row, last_col)
    in_cell = make("Less", rank, inside, dtype=ir.DataType.BOOL)
    sources = make("Where", in_cell, token(own_cell, slot), outside)

    every = make("Range", 0, tokens, 1)
    split = make("Concat", sources, destinations, axis=0)
    first = make("Unsqueeze", make("Range", 0, batch, 1), make.vector(1))
    places = make("Add", cell, kept)
    per_batch = make("Concat", make("Unsqueeze", batch, make.vector(0)), make.vector(1), axis=0)
    return Partition(
        sources=sources,
        destinations=destinations,
        order=make("ScatterElements", every, split, every, axis=0),
        kept=(make("Unsqueeze", kept, make.vector(0)), kept),
        kept_places=make("Expand", make("Range", 0, kept, 1), per_batch),
        places=(
            make("Unsqueeze", places, make.vector(1)),
            make("Expand", places, per_batch),
        ),
        token_base=make("Mul", first, tokens),
        merged_base=make("Mul", first, make("Add", kept, cells)),
    )


def _draw(make: _Typed, cell: ir.Value, seed: int) -> ir.Value:
    """A number from 0 to 3 for each cell: two rounds of a seeded shift and a cube modulo PRIME."""
    draw = random.Random(seed)
    value = cell
    for _ in range(2):
        value = make("Mod", make("Add", value, draw.randrange(PRIME)), PRIME)
        square = make("Mod", make("Mul", value, value), PRIME)
        value = make("Mod", make("Mul", square, value), PRIME)
    return make("Div", make("Mul", value, 4), PRIME)


def merge(
    emit: Emitter, part: Partition, hidden: ir.Value, tokens: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Nodes that match on ``hidden`` and merge ``tokens`` (both ``[B, N, C]``).

    The R sources most like their best destination (cosine similarity of ``hidden``) are averaged
    into it. Similarities and means are computed in fp32 whatever the graph's type: fp16 has too
    few steps below 1 to rank similarities, and sums of thousands of tokens could leave its range.

    Returns:
        The kept sources followed by the destinations ``[B, K + D, C]``, and for each token its
        row in that sequence, batch entries one after another ``[B, N]``, for ``unmerge``.
    """
    make = _Typed(emit)
    metric, wide = (
        value if value.dtype == ir.DataType.FLOAT else make.real("Cast", value, to=1)
        for value in (hidden, tokens)
    )
    last = make.vector(-1)
    norm = make.real("ReduceL2", metric, last, keepdims=1)
    unit = make.real("Div", metric, make.real("Max", norm, make.real_number(TINY)))
    a, b = (make.real("Gather", unit, ids, axis=1) for ids in (part.sources, part.destinations))
    scores = make.real("MatMul", a, make.real("Transpose", b, perm=[0, 2, 1]))
    # TopK of one is the maximum and its index in one sweep; ONNX says that ties take the first.
    best, index = make.top(scores, make.vector(1))
    likeness, match = make.real("Squeeze", best, last), make("Squeeze", index, last)
    # The least alike are picked, not the R most alike: K is the smaller number at ratios from
    # 0.375 on, and TensorRT-RTX's TopK takes at most 3840 (at ratio 0.5 that is N <= 15360).
    _, kept = make.top(likeness, part.kept[0], largest=0)
    place = make("Add", match, part.kept[1])
    place = make("ScatterElements", place, kept, part.kept_places, axis=1)

    # A kept source's place is below every destination's, so its column is all zero.
    row = make("Unsqueeze", place, make.vector(1))
    hits = make("Equal", row, part.places[0], dtype=ir.DataType.BOOL)
    one_hot = make.real("Cast", hits, to=1)
    total = make.real("MatMul", one_hot, make.real("Gather", wide, part.sources, axis=1))
    total = make.real("Add", total, make.real("Gather", wide, part.destinations, axis=1))
    count = make.real("ReduceSum", one_hot, last, keepdims=1)
    mean = make.real("Div", total, make.real("Add", count, make.real_number(1)))
    if wide is not tokens:
        mean = make("CastLike", mean, tokens, dtype=tokens.dtype)
    alone = make("Add", make("Gather", part.sources, kept), part.token_base)
    alone = _rows(make, tokens, alone)
    merged = make("Concat", alone, mean, axis=1, dtype=tokens.dtype)

    back = make("Gather", make("Concat", place, part.places[1], axis=1), part.order, axis=1)
    return merged, make("Add", back, part.merged_base)


def unmerge(emit: Emitter, value: ir.Value, rows: ir.Value) -> ir.Value:
    """Nodes that give every token of ``[B, N]`` ``rows`` its merged value ``[B, N, C]``."""
    return _rows(_Typed(emit), value, rows)


def _rows(make: _Typed, value: ir.Value, rows: ir.Value) -> ir.Value:
    """Rows of ``value`` ``[B, T, C]`` by number over the flattened batch, ``[B, len, C]``."""
    width = value.shape[2] if value.shape is not None else None
    if isinstance(width, int):
        shape = make.vector(-1, width)
    else:
        shape = make("Concat", make.vector(-1), make("Shape", value, start=2), axis=0)
    flat = make("Reshape", value, shape, dtype=value.dtype)
    return make("Gather", flat, rows, axis=0, dtype=value.dtype)
