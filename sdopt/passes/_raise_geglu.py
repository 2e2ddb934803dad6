"""Recognising GEGLU: one half of a projection times the GELU of its other half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_parts import is_op, left, number, other
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

KIND = "geglu"

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass
class _Half:
    """One half, 0 or 1, of ``source`` along its last axis, cut out by ``node``."""

    source: ir.Value
    index: int
    node: ir.Node
    width: int | None


def raise_geglu(
    gelu: ir.Node, shapes: Shapes, order: Mapping[ir.Node, int], ctx: PassContext
) -> bool:
    """Write ``value * Gelu(gate)`` of the halves of one projection with one Split of it.

    ``order`` says where the nodes stand. The form is one Split of the last axis with two outputs,
    and the value as the first operand of the Mul; which half is the gate is the model's.
    """
    gated, gate = gelu.outputs[0], gelu.inputs[0]
    mul = graph.single_consumer(gated)
    value = other(mul, gated) if is_op(mul, "Mul") and mul is not None else None
    if mul is None or gate is None or value is None or number(value) is not None:
        return False
    a, b = (_half(one, shapes) for one in (value, gate))
    if a is None or b is None:
        if not _is_projection(value) or not _is_projection(gate):
            return False
        reason = "its value and its gate are two projections, not the halves of one"
        return left(KIND, reason, gelu, ctx)
    for half in (a, b):
        if isinstance(half, str):
            return left(KIND, half, gelu, ctx)
    assert isinstance(a, _Half)
    assert isinstance(b, _Half)
    if a.source is not b.source or a.index == b.index:
        return left(KIND, "its value and its gate are not the two halves of one", gelu, ctx)
    is_split, is_ordered = a.node is b.node, mul.inputs[1] is gated
    if not is_split:
        value = _split(a, b, order, shapes, ctx)
    if not is_ordered:
        mul.replace_input_with(0, value)
        mul.replace_input_with(1, gated)
    if is_split and is_ordered:
        ctx.already(KIND)
    else:
        ctx.count(KIND)
    return True


def _half(value: ir.Value, shapes: Shapes) -> _Half | str | None:
    """Which half ``value`` is; text where it is cut otherwise, None where it is not cut."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is None or source is None or not is_op(node, "Split", "Slice"):
        return None
    if node.op_type == "Slice":
        return _sliced(node, source, shapes)
    dims, axis = shapes.dims(source), graph.attribute(node, "axis", 0)
    if axis != -1 and (dims is None or axis != len(dims) - 1):
        return f"its Split runs over axis {axis}, not known to be the last"
    count = len(node.outputs)
    if count != 2:
        return f"its Split has {_WORDS[count] if count < len(_WORDS) else count} outputs"
    sizes = shapes.elements(node.inputs[1]) if len(node.inputs) > 1 else None
    width = dims[-1].known if dims is not None else None
    uneven = sizes[0] != sizes[1] if sizes is not None else width is None or width % 2
    if uneven:
        return "the two parts of its Split are not known to be of one size"
    return _Half(source, node.outputs.index(value), node, width)


def _sliced(node: ir.Node, source: ir.Value, shapes: Shapes) -> _Half | str:
    dims = shapes.dims(source)
    width = dims[-1].known if dims is not None else None
    if dims is None or width is None or width % 2:
        return "the width of its projection is not known, or is odd"
    numbers = []
    for value in node.inputs[1:]:
        found = shapes.elements(value)
        if found is None or len(found) != 1 or found[0].known is None:
            return "the bounds of its Slice are not known"
        numbers.append(found[0].known)
    start, end, axis, step = (*numbers, *(0, 1)[len(numbers) - 2 :])
    if axis not in (-1, len(dims) - 1):
        return f"its Slice runs over axis {axis}, not over the last"
    bounds = range(width)[start:end:step]
    if bounds not in (range(width // 2), range(width // 2, width)):
        return "its Slice is no half of its projection"
    return _Half(source, int(bounds.start > 0), node, width)


def _split(
    a: _Half, b: _Half, order: Mapping[ir.Node, int], shapes: Shapes, ctx: PassContext
) -> ir.Value:
    """Let one Split of the source take the place of both cuts; returns its half of ``a``."""
    first = min((a.node, b.node), key=lambda node: order.get(node, len(order)))
    emit = ctx.emitter(first, f"{graph.module_path(first)}/raise_ops")
    assert a.width is not None
    parts = emit.many("Split", a.source, emit.const([a.width // 2] * 2), outputs=2, axis=-1)
    for half in (a, b):
        old = half.node.outputs[0]
        shapes.stands_for(parts[half.index], old)
        graph.replace_uses(old, parts[half.index])
    graph.remove_dead([a.node, b.node])
    return parts[a.index]


def _is_projection(value: ir.Value) -> bool:
    """Whether ``value`` comes from a MatMul or a Gemm, maybe with a bias."""
    node = value.producer()
    if is_op(node, "Add") and node is not None:
        return any(graph.producer(side, "MatMul") is not None for side in node.inputs)
    return is_op(node, "MatMul", "Gemm")
