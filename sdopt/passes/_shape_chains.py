"""Shapes that a graph computes although they can be written down: numbers, 0 and -1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import Dims
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

PARTS_OPSET = 15
"""Since it Shape has ``start`` and ``end``."""

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
    """Let constants take the place of the shapes of ``main`` that are known to be those.

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


def _is_reader(node: ir.Node) -> bool:
    """Whether it reads a computed shape, or is a Cast of what nobody said the type of."""
    if node.op_type == "Cast":
        return node.inputs[0] is not None and node.inputs[0].dtype is None
    reads = node.inputs[1:] or node.inputs
    return (node.op_type == "Reshape" or node.op_type in _VECTORS) and any(
        map(_is_computed, reads)
    )


def _cast(node: ir.Node, shapes: Shapes, ctx: PassContext) -> None:
    source = node.inputs[0]
    if source is not None and shapes.dtype(source) == graph.attribute(node, "to"):
        _bypass(node, ctx)


def _bypass(node: ir.Node, ctx: PassContext) -> None:
    """Let the input take the output's place, unless it cannot take its name."""
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    is_outer = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
    if not (out.is_graph_output() and is_outer):
        graph.replace_uses(out, source)
        graph.remove_dead([node])
        ctx.count("no-op removed")


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
    if dims is not None and list(dims) == list(wanted):
        _bypass(node, ctx)
        return
    numbers = _numbers(wanted, dims or ())
    if numbers.count(-1) <= 1:
        _write(node, 1, numbers, ir.DataType.INT64, ctx)
    elif graph.opset(ctx.model) >= PARTS_OPSET:
        _shorten(node, numbers, shapes, ctx)


def _numbers(wanted: Dims, dims: Dims) -> list[int]:
    """The target of a Reshape of ``dims``, with -1 for what is neither a number nor copied."""
    numbers = []
    for axis, size in enumerate(wanted):
        if size.known is not None:
            numbers.append(size.known)
        elif axis < len(dims) and dims[axis] == size:
            numbers.append(0)
        else:
            numbers.append(-1)
    return numbers


@dataclass(frozen=True)
class _Part:
    """Sizes ``start`` to ``end`` of ``source``."""

    source: ir.Value
    start: int
    end: int


def _shorten(node: ir.Node, numbers: Sequence[int], shapes: Shapes, ctx: PassContext) -> None:
    """Take the sizes that must be computed by one Shape for each run of them."""
    concat = graph.producer(node.inputs[1], "Concat")
    if concat is None:
        return
    parts: list[int | _Part] = []
    for value in concat.inputs:
        known = shapes.elements(value)
        part = _part(value)
        if known is None or (part is not None and part.end - part.start != len(known)):
            return
        for offset in range(len(known)):
            number, last = numbers[_length(parts)], parts[-1] if parts else None
            if number != -1 or part is None:
                if number == -1 and known[offset].number != -1:
                    return
                parts.append(number)
                continue
            at = part.start + offset
            if isinstance(last, _Part) and last.source is part.source and last.end == at:
                parts[-1] = _Part(last.source, last.start, at + 1)
            else:
                parts.append(_Part(part.source, at, at + 1))
    shortest = all(_is_short(value) for value in concat.inputs)
    if shortest and len(_runs(parts)) >= len(concat.inputs):
        return
    emit = ctx.emitter(node, f"{graph.module_path(node)}/shape")
    target = emit("Concat", *(_emitted(run, emit) for run in _runs(parts)), axis=0)
    target.type, target.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(numbers)])
    node.replace_input_with(1, target)
    graph.remove_dead([concat])
    ctx.count("shape shortened")


def _length(parts: Sequence[int | _Part]) -> int:
    return sum(part.end - part.start if isinstance(part, _Part) else 1 for part in parts)


def _runs(parts: Sequence[int | _Part]) -> list[list[int] | _Part]:
    """The same with neighbouring numbers in one list."""
    runs: list[list[int] | _Part] = []
    for part in parts:
        if isinstance(part, _Part):
            runs.append(part)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _emitted(run: list[int] | _Part, emit: graph.Emitter) -> ir.Value:
    if isinstance(run, list):
        return emit.const(run)
    size = emit("Shape", run.source, start=run.start, end=run.end)
    size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([run.end - run.start])
    return size


def _is_short(value: ir.Value | None) -> bool:
    return graph.constant(value) is not None or graph.producer(value, "Shape") is not None


def _part(value: ir.Value | None) -> _Part | None:
    """Which sizes of which value ``value`` holds, counted from the front."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Unsqueeze", "Squeeze", "Identity"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs:
        return None
    if node.op_type == "Shape":
        start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end")
        whole = node.inputs[0] is not None and end is not None and 0 <= start < end
        return _Part(node.inputs[0], start, end) if whole and node.inputs[0] else None
    inner = _whole(node.inputs[0])
    if inner is None:
        return None
    given = [graph.constant(one) for one in node.inputs[1:]]
    if any(one is None or one.size != 1 for one in given):
        return None
    numbers = [int(one.item()) for one in given if one is not None]
    if node.op_type == "Gather" and graph.attribute(node, "axis", 0) == 0 and numbers[0] >= 0:
        return _Part(inner, numbers[0], numbers[0] + 1)
    if (
        node.op_type == "Slice"
        and 0 <= numbers[0] < numbers[1]
        and numbers[2:] in ([], [0], [0, 1])
    ):
        return _Part(inner, numbers[0], numbers[1])
    return None


def _whole(value: ir.Value | None) -> ir.Value | None:
    """The value whose whole shape ``value`` is."""
    shape = graph.producer(value, "Shape")
    if shape is None or graph.attribute(shape, "start", 0) or graph.attribute(shape, "end"):
        return None
    return shape.inputs[0]


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
