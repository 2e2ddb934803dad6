"""What shape arithmetic says at many image sizes at once, without running the graph.

An exporter that traced a UNet at one size writes heights and widths as arithmetic on the graph's
inputs. Evaluating that arithmetic at a few sizes tells which of it holds at every size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sdopt import graph

Entry = np.ndarray | None
"""One number of a shape vector: its value at every probe ``[P]``, None if not known."""

Vector = list[Entry]
Dims = Sequence[Entry]

BATCH = 1009
"""What every free dimension other than height and width is at the probes: no size divides it."""

_SIDES = (8, 9, 10, 11, 12, 13, 15, 16, 23, 24, 31, 40)
_PAIRS = np.array(list(itertools.product(_SIDES, _SIDES)))
HEIGHT, WIDTH = _PAIRS[:, 0], _PAIRS[:, 1]

_LONGEST = 16
"""Constants with more elements than this are no shapes."""


class Sizes:
    """The value of every shape vector of a graph at the probes, as far as it can be known.

    ``known`` gives dimensions of values; for all others only fixed dimensions are known.
    """

    def __init__(self, model: ir.Model, known: Mapping[ir.Value, Dims]) -> None:
        self._known = known
        self._vectors: dict[ir.Value, Vector | None] = {}
        for node in model.graph:
            if (rule := _RULES.get(node.op_type)) and node.domain in ("", "ai.onnx"):
                self._vectors[node.outputs[0]] = rule(node, self)

    def __getitem__(self, value: ir.Value | None) -> Vector | None:
        """The entries of a shape vector (one for a scalar), or None if not even their number."""
        if value is None:
            return None
        if value not in self._vectors:
            self._vectors[value] = _constant(value)
        return self._vectors[value]

    def dims(self, value: ir.Value | None) -> Dims | None:
        """The dimensions of a value; None if not even the rank is known."""
        if value is None or value in self._known:
            return self._known[value] if value is not None else None
        if value.shape is None:
            return None
        return [np.full(len(HEIGHT), d) if isinstance(d, int) else None for d in value.shape]


def of_inputs(model: ir.Model) -> Sizes:
    """Sizes where each rank-4 input's free height and width take the probes' values."""
    known: dict[ir.Value, Dims] = {}
    for value in model.graph.inputs:
        if value.shape is not None:
            free = [np.full(len(HEIGHT), BATCH)] * len(value.shape)
            if len(free) == 4:
                free[2:] = [HEIGHT, WIDTH]
            known[value] = [
                np.full(len(HEIGHT), dim) if isinstance(dim, int) else free[axis]
                for axis, dim in enumerate(value.shape)
            ]
    return Sizes(model, known)


def latents(model: ir.Model) -> list[ir.Value]:
    """The graph inputs ``[B, C, H, W]`` whose height or width is free."""
    return [
        value
        for value in model.graph.inputs
        if value.shape is not None
        and len(value.shape) == 4
        and not all(isinstance(dim, int) for dim in value.shape[2:])
    ]


def sides(vector: Vector | None) -> Dims:
    """Height and width in the target of a Resize, which names all four axes or those two."""
    return vector[-2:] if vector is not None and len(vector) in (2, 4) else [None, None]


def part(emit: graph.Emitter, vector: ir.Value | None, start: int, end: int) -> ir.Value:
    """Emit some entries of a vector; Slice, since Shape has start and end from opset 15 only."""
    return emit("Slice", vector, emit.const([start]), emit.const([end]))


def depends(entry: Entry) -> tuple[bool, bool]:
    """Whether an entry changes with the height, and whether with the width."""
    if entry is None:
        return False, False
    grid = entry.reshape(len(_SIDES), len(_SIDES))
    return bool(np.any(grid != grid[:1])), bool(np.any(grid != grid[:, :1]))


def is_baked(entry: Entry) -> bool:
    """Whether an entry follows height or width, but not as a tensor's true size does.

    A stride-2 convolution makes ``ceil(n / 2)`` of ``n``, so true sizes are ``ceil(H / 2**k)``,
    ``ceil(W / 2**k)`` and their product. ``2 * ceil(H / 8)`` equals ``ceil(H / 4)`` only where
    nothing was rounded.
    """
    if entry is None or not any(depends(entry)):
        return False
    if not np.any(entry % BATCH):
        entry = entry // BATCH
    halved = [(-(-HEIGHT // 2**k), -(-WIDTH // 2**k)) for k in range(7)]
    true = [size for h, w in halved for size in (h, w, h * w)]
    return not any(np.array_equal(entry, size) for size in true)


def is_number(value: ir.Value) -> bool:
    """Whether a value is a constant of one element, such as a scale of 1.0."""
    return graph.scalar(value) is not None


def _constant(value: ir.Value) -> Vector | None:
    """The entries of a small constant; a checkpoint's tensor is not looked at."""
    tensor, node = value.const_value, value.producer()
    if tensor is None and node is not None and node.op_type == "Constant":
        tensor = graph.constant_tensor(node)
    if tensor is None or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
        return None
    if len(tensor.shape) > 1 or tensor.size > _LONGEST or value.is_graph_input():
        return None
    array = tensor.numpy().reshape(-1)
    return [np.full(len(HEIGHT), x) for x in array] if array.dtype.kind in "if" else None


def _shape(node: ir.Node, sizes: Sizes) -> Vector | None:
    dims = sizes.dims(node.inputs[0])
    if dims is None:
        return None
    return list(dims[graph.attribute(node, "start", 0) : graph.attribute(node, "end")])


def _same(node: ir.Node, sizes: Sizes) -> Vector | None:
    return sizes[node.inputs[0]]


def _cast(node: ir.Node, sizes: Sizes) -> Vector | None:
    vector = sizes[node.inputs[0]]
    kind = ir.DataType(graph.attribute(node, "to"))
    if vector is None or kind not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT):
        return None
    return [None if entry is None else entry.astype(kind.numpy()) for entry in vector]


def _concat(node: ir.Node, sizes: Sizes) -> Vector | None:
    parts = [sizes[value] for value in node.inputs]
    return [entry for part in parts for entry in part or []] if None not in parts else None


def _numbers(vector: Vector | None) -> list[int] | None:
    """The integers of a vector that is the same at every probe."""
    if vector is None or any(entry is None or np.any(entry != entry[0]) for entry in vector):
        return None
    return [int(entry[0]) for entry in vector if entry is not None]


def _gather(node: ir.Node, sizes: Sizes) -> Vector | None:
    vector, at = sizes[node.inputs[0]], _numbers(sizes[node.inputs[1]])
    if at is None:
        return None
    if vector is None:
        return [None] * len(at)
    return [vector[i] for i in at] if all(-len(vector) <= i < len(vector) for i in at) else None


def _slice(node: ir.Node, sizes: Sizes) -> Vector | None:
    vector = sizes[node.inputs[0]]
    bounds = [_numbers(sizes[value]) for value in node.inputs[1:3]]
    steps = _numbers(sizes[node.inputs[4]]) if len(node.inputs) > 4 and node.inputs[4] else [1]
    if len(bounds) < 2 or None in bounds or steps != [1]:
        return None
    (start,), (end,) = (bound or [0] for bound in bounds)
    if vector is None:
        return [None] * (end - start) if 0 <= start < end <= _LONGEST else None
    return vector[start:end]


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[[ir.Node, Sizes], Vector | None]:
    def rule(node: ir.Node, sizes: Sizes) -> Vector | None:
        vectors = [sizes[value] for value in node.inputs]
        if any(vector is None for vector in vectors):
            return None
        length = max(len(vector or ()) for vector in vectors)
        if any(len(vector or ()) not in (1, length) for vector in vectors):
            return None
        columns = zip(
            *((vector or []) * (length // len(vector or [0])) for vector in vectors), strict=True
        )
        return [
            None if any(e is None for e in column) else function(*column) for column in columns
        ]

    return rule


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ONNX Div: integers are cut towards zero; where ``b`` is 0 the result does not matter."""
    safe = np.where(b == 0, 1, b)
    return np.fix(a / safe).astype(np.int64) if a.dtype.kind == "i" else a / safe


_RULES: dict[str, Callable[[ir.Node, Sizes], Vector | None]] = {
    "Shape": _shape,
    "Identity": _same,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Reshape": _same,
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(lambda a, b: np.mod(a, np.where(b == 0, 1, b))),
    "Neg": _elementwise(np.negative),
    "Floor": _elementwise(np.floor),
    "Ceil": _elementwise(np.ceil),
    "Max": _elementwise(np.maximum),
    "Min": _elementwise(np.minimum),
}
