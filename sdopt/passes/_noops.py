"""Nodes that hand their input on unchanged, and the sequence spelling of Split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._folding import static_dims
from sdopt.passes.base import PassContext

Rule = Callable[[ir.Node, ir.Value], ir.Value | None]

_LAST = np.iinfo(np.int64).max // 2
"""Exporters write 'to the end' as any number of about this size or more."""


def bypass(node: ir.Node) -> ir.Value | None:
    """The input that ``node`` hands on unchanged, bit for bit, or None."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) < 1 or not node.inputs:
        return None
    first = node.inputs[0]
    rule = _RULES.get(node.op_type)
    if first is None or rule is None:
        return None
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return None
    return rule(node, first)


def _identity(node: ir.Node, first: ir.Value) -> ir.Value | None:
    taken = first.is_graph_input() or first.is_initializer() or first.is_graph_output()
    if node.outputs[0].is_graph_output() and (taken or first.graph is not node.graph):
        return None  # the Identity is what gives the output a name of its own
    return first


def _cast(node: ir.Node, first: ir.Value) -> ir.Value | None:
    return (
        first if first.dtype is not None and first.dtype == graph.attribute(node, "to") else None
    )


def _transpose(node: ir.Node, first: ir.Value) -> ir.Value | None:
    perm = graph.attribute(node, "perm")
    return first if perm is not None and list(perm) == sorted(perm) else None


def _concat(node: ir.Node, first: ir.Value) -> ir.Value | None:
    return first if len(node.inputs) == 1 else None


def _neutral(number: float) -> Rule:
    """Multiplying or dividing by one; the constant may not add a dimension."""

    def rule(node: ir.Node, first: ir.Value) -> ir.Value | None:
        sides = (
            [node.inputs[:2], node.inputs[1::-1]] if node.op_type == "Mul" else [node.inputs[:2]]
        )
        for kept, other in sides:
            array = graph.constant(other, most=1)
            if kept is None or array is None or array.size != 1 or float(array.item()) != number:
                continue
            if array.ndim == 0 or (kept.shape is not None and len(kept.shape) >= array.ndim):
                return kept
        return None

    return rule


def _slice(node: ir.Node, first: ir.Value) -> ir.Value | None:
    given = [graph.constant(value) for value in node.inputs[1:]]
    if len(given) < 2 or given[0] is None or given[1] is None:
        return None
    if len(given) > 3 and (given[3] is None or np.any(given[3] != 1)):
        return None
    return first if np.all(given[0] == 0) and np.all(given[1] >= _LAST) else None


def _dropout(node: ir.Node, first: ir.Value) -> ir.Value | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return first if training is None or graph.scalar(training) == 0 else None


def _reshape(node: ir.Node, first: ir.Value) -> ir.Value | None:
    """``[n] -> [] -> [n]`` for one element, and a reshape to the shape that is there already."""
    shape = graph.constant(node.inputs[1])
    if shape is None:
        return None
    dims = static_dims(first)
    if dims is not None and dims == shape.tolist():
        return first
    squeezed = graph.producer(first, "Squeeze")
    if squeezed is not None and shape.size == 1 and shape.item() in (1, -1):
        source = squeezed.inputs[0]
        return source if _has_one_element(source) else None
    return None


def _has_one_element(value: ir.Value | None) -> bool:
    """Whether ``value`` is ``[1]``; exporters leave the result of ``Shape`` without a shape."""
    if (shape := graph.producer(value, "Shape")) is not None and shape.inputs[0] is not None:
        source = shape.inputs[0].shape
        start, end = graph.attribute(shape, "start", 0), graph.attribute(shape, "end")
        if source is not None:
            return len(list(source)[slice(start, end)]) == 1
    return static_dims(value) == [1]


_RULES: dict[str, Rule] = {
    "Identity": _identity,
    "Cast": _cast,
    "Transpose": _transpose,
    "Concat": _concat,
    "Mul": _neutral(1.0),
    "Div": _neutral(1.0),
    "Slice": _slice,
    "Dropout": _dropout,
    "Reshape": _reshape,
}


def sequence_to_split(node: ir.Node, ctx: PassContext) -> bool:
    """Rewrite ``SplitToSequence`` read only by constant ``SequenceAt`` into one ``Split``."""
    if node.op_type != "SplitToSequence" or node.inputs[0] is None:
        return False
    axis = graph.attribute(node, "axis", 0)
    picks = {
        user: graph.scalar(user.inputs[1]) if user.op_type == "SequenceAt" else None
        for user in node.outputs[0].consumers()
    }
    shape = node.inputs[0].shape
    known = shape is not None and -len(shape) <= axis < len(shape)
    length = shape[axis] if shape is not None and known else None
    sizes = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    whole = node.outputs[0].is_graph_output()
    if whole or None in picks.values():
        ctx.skip("a sequence is used for more than picking its parts", node)
        return False
    if sizes is None or (sizes.ndim == 0 and not isinstance(length, int)):
        ctx.skip("the sizes of the parts are not known", node)
        return False
    if sizes.ndim == 0:
        chunk = int(sizes)
        assert isinstance(length, int)
        sizes = np.array([min(chunk, length - at) for at in range(0, length, chunk)])
    if any(at is None or not -sizes.size <= at < sizes.size for at in picks.values()):
        ctx.skip("a part is asked for that the sequence does not have", node)
        return False
    emit = ctx.emitter(node, node.outputs[0].name or "split")
    split = emit.const(sizes)
    parts = emit.many("Split", node.inputs[0], split, outputs=sizes.size, axis=axis)
    for user, at in picks.items():
        assert at is not None
        part, old = parts[int(at)], user.outputs[0]
        if old.type is not None:
            part.type, part.shape = old.type, old.shape
        graph.replace_uses(old, part)
        user.graph.remove(user, safe=True)  # type: ignore[union-attr]
    graph.remove_dead([node])
    return True
