"""Which axis of each value runs over the batch, followed through a graph of fixed sizes.

What is followed is halves: *the half of a value along its axis is what the graph computes of the
halves of its inputs*. Every rule below keeps that, in both directions, so an axis is never found
by its size being 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sdopt import graph

Sizes = Sequence[int | None]
"""The dimensions of a value, None where they are not numbers."""


class Unproven(Exception):  # noqa: N818 - an answer, caught where it is asked for
    """Why the batch cannot be followed through a node."""

    def __init__(self, reason: str, node: ir.Node | str) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


class Batch:
    """What is known so far: axes of values, and the numbers in shape vectors that hold the batch.

    Attributes:
        axes: value to the axis whose half is meant.
        entries: node and index of an input that is a constant vector, to the entries to halve.
        origins: values whose size a shape vector takes its batch from, with the node it is for.
    """

    def __init__(self, model: ir.Model) -> None:
        self.axes: dict[ir.Value, int] = {}
        self.entries: dict[tuple[ir.Node, int], set[int]] = {}
        self.origins: list[tuple[ir.Value, ir.Node]] = []
        self.opset = graph.opset(model)
        self._main = model.graph
        self._sizes = _inferred(model)
        self._changed: list[ir.Value] = []
        self._checked: set[ir.Value] = set()

    def start(self, value: ir.Value) -> None:
        """The batch is axis 0 of that input of the graph."""
        self.axes[value] = 0
        self._checked.add(value)
        self._changed.append(value)

    def sizes(self, value: ir.Value, node: ir.Node) -> Sizes:
        """The dimensions of a value that ``node`` reads or makes."""
        if value.const_value is not None:
            return list(value.const_value.shape.numpy())
        found = self._sizes.get(value.name or "")
        if found is None:
            raise Unproven(f"the number of axes of {value.name} is not known", node)
        return found

    def axis(self, value: ir.Value | None) -> int | None:
        """The axis of a value, None if it has none or that is not known yet."""
        return self.axes.get(value) if value is not None else None

    def mark(self, value: ir.Value | None, axis: int, node: ir.Node) -> None:
        """``node`` proves that the batch is in ``axis`` of ``value``."""
        if value is None:
            raise Unproven(f"{node.op_type} lacks an input", node)
        known = self.axes.setdefault(value, axis)
        if known != axis:
            raise Unproven(f"{value.name} would hold the batch in axes {known} and {axis}", node)
        if value in self._checked:
            return
        self._checked.add(value)
        size = self.sizes(value, node)[axis]
        if size is None or size % 2:
            raise Unproven(f"axis {axis} of {value.name} is {size or 'dynamic'}, not even", node)
        if is_constant(value) and halved(value, axis) is None:
            raise Unproven(
                f"{value.name} is a constant of {size} along the batch, with halves that differ "
                "or are too large to compare",
                node,
            )
        self._changed.append(value)

    def touched(self) -> list[ir.Node]:
        """The nodes at values that were marked since the last call.

        Raises:
            Unproven: one is inside a control flow operator.
        """
        nodes: dict[ir.Node, None] = {}
        for value in self._changed:
            maker = value.producer()
            for node in (*([maker] if maker is not None else []), *value.consumers()):
                if node.graph is not self._main:
                    raise Unproven("the batch enters the body of a control flow operator", node)
                nodes[node] = None
        self._changed = []
        return list(nodes)

    def halve_entry(self, node: ir.Node, slot: int, entry: int, reader: ir.Node) -> None:
        """The shape vector ``node.inputs[slot]`` holds the batch in ``entry``, for ``reader``.

        A constant is noted for a change; what is computed must come from the size of a value.
        """
        value = node.inputs[slot]
        maker = value.producer() if value is not None else None
        if value is None or value.is_graph_input():
            raise Unproven("its shape is an input of the graph", reader)
        if is_constant(value):
            vector = graph.constant(value)
            if vector is None or (number := vector.reshape(-1)[entry]) % 2 or number < 2:
                raise Unproven("its shape has no even number for the batch", reader)
            self.entries.setdefault((node, slot), set()).add(entry)
            return
        if node is not reader and len(node.outputs[0].uses()) > 1:
            raise Unproven("its shape is computed for several places at once", reader)
        if maker is None:
            raise Unproven("its shape comes from outside of the graph", reader)
        if maker.op_type == "Concat":
            self._halve_part(maker, entry, reader)
        elif maker.op_type in ("Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity"):
            self.halve_entry(maker, 0, entry, reader)
        else:
            self._live(maker, reader)

    def _halve_part(self, concat: ir.Node, entry: int, reader: ir.Node) -> None:
        for index, part in enumerate(concat.inputs):
            if part is None:
                break
            (length,) = self.sizes(part, reader) or (None,)
            if length is None:
                break
            if entry < length:
                self.halve_entry(concat, index, entry, reader)
                return
            entry -= length
        raise Unproven("its shape is put together of parts of unknown length", reader)

    def _live(self, node: ir.Node, reader: ir.Node) -> None:
        """See that a number is the size of a value, maybe times a constant."""
        if node.op_type == "Shape":
            if (source := node.inputs[0]) is not None:
                self.origins.append((source, reader))
                return
        elif node.op_type in ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity"):
            if (maker := node.inputs[0].producer() if node.inputs[0] else None) is not None:
                self._live(maker, reader)
                return
        elif node.op_type == "Mul":
            makers = [v.producer() for v in node.inputs if v is not None and not is_constant(v)]
            if len(makers) == 1 and makers[0] is not None:
                self._live(makers[0], reader)
                return
        raise Unproven(f"its shape is computed by {node.op_type}: run clean first", reader)


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer or the output of a Constant node."""
    maker = value.producer()
    return value.const_value is not None or (maker is not None and maker.op_type == "Constant")


def halved(value: ir.Value, axis: int) -> np.ndarray | None:
    """The first half of a small constant along ``axis`` if the second one is the same."""
    array = graph.constant(value)
    if array is None or array.shape[axis] % 2:
        return None
    first, second = np.split(array, 2, axis=axis)
    return first if np.array_equal(first, second) else None


def _inferred(model: ir.Model) -> Mapping[str, Sizes]:
    """Sizes of all values by name, inferred on a copy."""
    copy = model.clone()
    ShapeInferencePass()(copy)
    values = [*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs)]
    return {
        v.name or "": [dim if isinstance(dim, int) else None for dim in v.shape]
        for v in values
        if v.shape is not None
    }


def along(node: ir.Node, batch: Batch, *values: ir.Value | None) -> int | None:
    """The one axis that the first input, the output and ``values`` share, marked on all."""
    same = [node.inputs[0], *node.outputs, *values]
    known = next((axis for v in same if (axis := batch.axis(v)) is not None), None)
    if known is not None:
        for value in same:
            batch.mark(value, known, node)
    return known


def axis_of(node: ir.Node, batch: Batch, default: int) -> int:
    first = node.inputs[0]
    rank = len(batch.sizes(first, node)) if first is not None else 0
    axis: int = graph.attribute(node, "axis", default)
    return axis + rank if axis < 0 else axis


def spread(
    node: ir.Node, batch: Batch, inputs: Sequence[ir.Value | None], out: ir.Value, ends: int = 0
) -> None:
    """Broadcasting of all axes but the last ``ends``, which are the caller's."""
    rank = len(batch.sizes(out, node))
    operands = [(v, rank - len(batch.sizes(v, node))) for v in inputs if v is not None]
    for value, shift in operands:
        if (axis := batch.axis(value)) is not None and axis + shift < rank - ends:
            batch.mark(out, axis + shift, node)
    axis = batch.axis(out)
    if axis is None or axis >= rank - ends:
        return
    for value, shift in operands:
        if axis >= shift and batch.sizes(value, node)[axis - shift] != 1:
            batch.mark(value, axis - shift, node)
