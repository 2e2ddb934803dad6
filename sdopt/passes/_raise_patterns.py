"""What a computed mask holds, found without running it: one number, positions, or a triangle."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import ONE
from sdopt.passes._raise_shapes import Shapes

_MOST = 1 << 20
"""Elements of a constant mask that is read: 1024 x 1024."""

_STEPS = 64
"""Operators that a mask's computation may be deep."""

_NUMBERS: dict[str, Callable[[float, float], float]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "And": lambda a, b: float(bool(a) and bool(b)),
    "Or": lambda a, b: float(bool(a) or bool(b)),
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
}
_COMPARED = {
    "Less": (-1, 1.0, 0.0),
    "LessOrEqual": (0, 1.0, 0.0),
    "Greater": (0, 0.0, 1.0),
    "GreaterOrEqual": (-1, 0.0, 1.0),
}
"""For ``key <op> query``: how far ahead the band reaches, and the truth inside and outside."""

_MIRRORED = {
    "Less": "Greater",
    "Greater": "Less",
    "LessOrEqual": "GreaterOrEqual",
    "GreaterOrEqual": "LessOrEqual",
}


@dataclass(frozen=True)
class Fill:
    """The same number everywhere."""

    number: float


@dataclass(frozen=True)
class Places:
    """The index along ``axis`` (counted from the end, -1 is the last) plus ``first``."""

    axis: int
    first: int


@dataclass(frozen=True)
class Band:
    """``inside`` at query i and key j of the last two axes where ``j <= i + ahead``."""

    ahead: int
    inside: float
    outside: float


Pattern = Fill | Places | Band


def is_causal(value: ir.Value, lowest: float, shapes: Shapes) -> bool:
    """Whether an additive mask is surely 0 up to the diagonal and at most ``lowest`` beyond."""
    found = Patterns(shapes).of(value)
    if not isinstance(found, Band) or found.ahead != 0:
        return False
    return found.inside == 0 and found.outside <= lowest


class Patterns:
    """Patterns of the values behind one mask, each looked at once."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._known: dict[ir.Value, Pattern | None] = {}

    def of(self, value: ir.Value | None, depth: int = 0) -> Pattern | None:
        """The pattern of ``value``, or None where it has none that is certain."""
        if value is None or depth > _STEPS:
            return None
        if value not in self._known:
            self._known[value] = None  # a cycle ends here
            self._known[value] = self._constant(value) or self._computed(value, depth + 1)
        return self._known[value]

    def _constant(self, value: ir.Value) -> Pattern | None:
        array = graph.constant(value, most=_MOST)
        if array is None or array.size == 0 or array.dtype.kind not in "fiub":
            return None
        if np.all(array == array.flat[0]):
            return Fill(float(array.flat[0]))
        if array.ndim == 1 and array.dtype.kind in "iu":
            steps = np.arange(array.size) + array[0]
            return Places(-1, int(array[0])) if np.array_equal(array, steps) else None
        if array.ndim < 2:
            return None
        keys = np.arange(array.shape[-1])
        below = keys[None, :] <= np.arange(array.shape[-2])[:, None]
        parts = [array[..., below], array[..., ~below]]
        if any(part.size == 0 or np.any(part != part.flat[0]) for part in parts):
            return None
        return Band(0, *(float(part.flat[0]) for part in parts))

    def _computed(self, value: ir.Value, depth: int) -> Pattern | None:
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or not node.inputs:
            return None
        op, first = node.op_type, node.inputs[0]
        if op == "ConstantOfShape":
            fill = graph.attribute(node, "value")
            return Fill(0.0 if fill is None else float(fill.numpy().reshape(-1)[0]))
        if op == "Range":
            start, step = graph.scalar(first), graph.scalar(node.inputs[2])
            return Places(-1, int(start)) if start is not None and step == 1 else None
        if op in _NUMBERS and len(node.inputs) == 2:
            sides = [self.of(side, depth) for side in node.inputs]
            return self._binary(op, node, sides[0], sides[1])
        if op == "Where":
            return self._where(node, depth)
        found = self.of(first, depth)
        if found is None or first is None:
            return None
        if op in ("Identity", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice"):
            return self._moved(found, node, first, value)
        if op == "Cast":
            return _cast(found, ir.DataType(graph.attribute(node, "to")))
        if op == "Not":
            return _mapped(found, lambda number: float(not number))
        if op == "Trilu" and isinstance(found, Fill):
            upper = graph.attribute(node, "upper", 1)
            ahead = 0.0 if len(node.inputs) < 2 else graph.scalar(node.inputs[1])
            if ahead is not None and upper:
                return Band(int(ahead) - 1, 0.0, found.number)
            return None if ahead is None else Band(int(ahead), found.number, 0.0)
        return None

    def _moved(
        self, found: Pattern, node: ir.Node, before: ir.Value, after: ir.Value
    ) -> Pattern | None:
        """The pattern behind what only adds, drops or repeats axes, or cuts the end."""
        if isinstance(found, Fill) or node.op_type == "Identity":
            return found
        old, new = self._shapes.dims(before), self._shapes.dims(after)
        if old is None or new is None:
            return None
        if node.op_type == "Slice":
            starts = graph.constant(node.inputs[1])
            steps = graph.constant(node.inputs[4]) if len(node.inputs) > 4 else np.array([1])
            plain = starts is not None and steps is not None and not starts.any()
            return found if plain and steps is not None and np.all(steps == 1) else None
        if isinstance(found, Places):
            # One axis of places among axes of 1 stays that axis wherever it moves to.
            size = old[found.axis]
            rest = [dim for i, dim in enumerate(old) if i != len(old) + found.axis]
            if node.op_type == "Expand":
                return found if new[found.axis] == size else None
            at = [i - len(new) for i, dim in enumerate(new) if dim == size]
            alone = all(dim == ONE for dim in rest) and size != ONE and len(at) == 1
            others = [dim for i, dim in enumerate(new) if i - len(new) not in at]
            return replace(found, axis=at[0]) if alone and all(d == ONE for d in others) else None
        return found if len(new) > 1 and list(old[-2:]) == list(new[-2:]) else None

    def _binary(
        self, op: str, node: ir.Node, a: Pattern | None, b: Pattern | None
    ) -> Pattern | None:
        if a is None or b is None or not self._keeps_axes(node, [a, b]):
            return None
        if isinstance(a, Places) and isinstance(b, Places):
            if op not in _COMPARED or {a.axis, b.axis} != {-1, -2}:
                return None
            if a.axis == -2:
                a, b, op = b, a, _MIRRORED[op]
            ahead, *truth = _COMPARED[op]
            return Band(b.first - a.first + ahead, *truth)
        if isinstance(a, Places) or isinstance(b, Places):
            if isinstance(b, Places) and op == "Add":
                a, b = b, a
            if op not in ("Add", "Sub") or not isinstance(a, Places) or not isinstance(b, Fill):
                return None
            step = b.number if op == "Add" else -b.number
            return replace(a, first=a.first + int(step)) if step == int(step) else None
        do = _NUMBERS[op]
        if isinstance(a, Fill) and isinstance(b, Fill):
            return Fill(float(do(a.number, b.number)))
        return _banded([a, b], lambda x, y: float(do(x, y)))

    def _keeps_axes(self, node: ir.Node, found: list[Pattern]) -> bool:
        """Whether no axis that a pattern runs along is one of size 1 that the others widen."""
        out = self._shapes.dims(node.outputs[0])
        for side, pattern in zip(node.inputs, found, strict=True):
            if isinstance(pattern, Fill):
                continue
            dims = self._shapes.dims(side)
            axes = [-1, -2] if isinstance(pattern, Band) else [pattern.axis]
            if dims is None or out is None or len(dims) < -min(axes):
                return False
            if any(dims[axis] != out[axis] for axis in axes):
                return False
        return True

    def _where(self, node: ir.Node, depth: int) -> Pattern | None:
        condition, a, b = (self.of(side, depth) for side in node.inputs)
        if isinstance(condition, Fill):
            chosen, at = (a, 1) if condition.number else (b, 2)
            dims = self._shapes.dims(node.inputs[at])
            same = dims is not None and dims == self._shapes.dims(node.outputs[0])
            return chosen if same or isinstance(chosen, Fill) else None
        if condition is None or a is None or b is None:
            return None
        if not self._keeps_axes(node, [condition, a, b]):
            return None
        return _banded([condition, a, b], lambda yes, x, y: x if yes else y)


def _banded(parts: list[Pattern], do: Callable[..., float]) -> Pattern | None:
    """The band that ``do`` makes of bands with one edge and of fills."""
    bands = [part for part in parts if isinstance(part, Band)]
    if len({band.ahead for band in bands}) != 1 or any(isinstance(p, Places) for p in parts):
        return None
    inside = [part.inside if isinstance(part, Band) else _number(part) for part in parts]
    outside = [part.outside if isinstance(part, Band) else _number(part) for part in parts]
    return Band(bands[0].ahead, do(*inside), do(*outside))


def _number(part: Pattern) -> float:
    assert isinstance(part, Fill)
    return part.number


def _mapped(found: Pattern, do: Callable[[float], float]) -> Pattern | None:
    if isinstance(found, Fill):
        return Fill(do(found.number))
    if isinstance(found, Band):
        return Band(found.ahead, do(found.inside), do(found.outside))
    return None


def _cast(found: Pattern, to: ir.DataType) -> Pattern | None:
    if isinstance(found, Places):
        return found
    if to == ir.DataType.BOOL:
        return _mapped(found, lambda number: float(bool(number)))
    kind = to.numpy()

    def convert(number: float) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.float64(number).astype(kind))

    return _mapped(found, convert)
