"""Shapes that a graph computes although they can be written down: numbers, 0 and -1."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import Dims
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

_VECTORS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1,),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
}
"""Inputs that hold one-dimensional integers, int64 but for Slice, which may have int32."""


def write_down(main: ir.Graph, ctx: PassContext) -> None:
    """Let constants take the place of the shapes of ``main`` that are known to be them.

    What a Reshape gets may hold 0 for a size that stays where it is and one -1 for the rest, so
    most of a graph for all sizes needs no arithmetic. What computed the shape falls away when
    nothing else reads it.
    """
    computed = [node for node in main if node.op_type == "Reshape" or node.op_type in _VECTORS]
    computed = [
        node for node in computed if any(map(_is_computed, node.inputs[1:] or node.inputs))
    ]
    if not computed:
        return
    shapes = Shapes(main)
    for node in computed:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Reshape":
            _reshape(node, shapes, ctx)
        for index in _VECTORS.get(node.op_type, ()):
            _vector(node, index, shapes, ctx)


def _is_computed(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type != "Constant"


def _reshape(node: ir.Node, shapes: Shapes, ctx: PassContext) -> None:
    target, source = node.inputs[1], node.inputs[0]
    if target is None or source is None or graph.attribute(node, "allowzero", 0):
        return
    wanted, dims = shapes.elements(target), shapes.dims(source)
    if wanted is None or not _is_computed(target):
        return
    if dims is not None and list(dims) == list(wanted) and _keeps_its_name(node):
        graph.replace_uses(node.outputs[0], source)
        graph.remove_dead([node])
        ctx.count("no-op removed")
        return
    numbers = _numbers(wanted, dims or ())
    if numbers is not None:
        _write(node, 1, numbers, ir.DataType.INT64, ctx)


def _keeps_its_name(node: ir.Node) -> bool:
    """A graph output that is an input, too, would need an Identity instead."""
    source = node.inputs[0]
    assert source is not None
    is_outer = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
    return not (node.outputs[0].is_graph_output() and is_outer)


def _numbers(wanted: Dims, dims: Dims) -> list[int] | None:
    """The target of a Reshape of ``dims`` as numbers, if at most one of them is not known."""
    numbers = []
    for axis, size in enumerate(wanted):
        if size.known is not None:
            numbers.append(size.known)
        elif axis < len(dims) and dims[axis] == size:
            numbers.append(0)
        else:
            numbers.append(-1)
    return numbers if numbers.count(-1) <= 1 else None


def _vector(node: ir.Node, index: int, shapes: Shapes, ctx: PassContext) -> None:
    value = node.inputs[index] if index < len(node.inputs) else None
    elements = shapes.elements(value) if _is_computed(value) else None
    if elements is None or value is None:
        return
    numbers = [size.known for size in elements]
    dtype = shapes.dtype(value) if node.op_type == "Slice" else ir.DataType.INT64
    if dtype is None:
        # The bounds of a Slice have one type, and its axes are rarely computed.
        types = {shapes.dtype(one) for one in node.inputs[1:] if one is not None} - {None}
        dtype = types.pop() if len(types) == 1 else None
    if dtype is not None and None not in numbers:
        _write(node, index, [n for n in numbers if n is not None], dtype, ctx)


def _write(
    node: ir.Node, index: int, numbers: Sequence[int], dtype: ir.DataType, ctx: PassContext
) -> None:
    old = node.inputs[index]
    emit = ctx.emitter(node, f"{graph.module_path(node)}/shape")
    node.replace_input_with(index, emit.const(numbers, dtype.numpy()))
    if old is not None and (made := old.producer()) is not None:
        graph.remove_dead([made])
    ctx.count("shape written down")
