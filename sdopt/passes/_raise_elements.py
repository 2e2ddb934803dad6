"""What small vectors of sizes hold, operator by operator."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import Dim, Dims, arithmetic, chosen, equal, filled, sliced

_PASSED_ON = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Cast", "CastLike", "Identity"})


def evaluate(node: ir.Node, shapes: Any) -> Dims | None:
    """What the output of a node of shape arithmetic holds, if it is known."""
    op, out = node.op_type, node.outputs[0]
    if op == "Shape":
        dims = shapes.dims(node.inputs[0])
        span = slice(graph.attribute(node, "start", 0), graph.attribute(node, "end"))
        return None if dims is None else list(dims)[span]
    if op == "ConstantOfShape":
        return filled(shapes.elements(node.inputs[0]), graph.attribute(node, "value"))
    if op == "Equal":
        return equal(*(shapes.elements(value) for value in node.inputs))
    if op == "Where":
        return chosen([shapes.elements(value) for value in node.inputs])
    if op not in _PASSED_ON | {"Gather", "Slice", "Concat", "Mul", "Div", "Add", "Sub"}:
        return None
    parts = [shapes.elements(value) for value in node.inputs]
    first = parts[0] if parts else None
    if op == "Gather" and graph.attribute(node, "axis", 0) == 0 and parts[1] is not None:
        places = [int(at.number) for at in parts[1]]
        if first is not None and all(-len(first) <= at < len(first) for at in places):
            return [first[at] for at in places]
        # One number of a vector that nothing is known about is still one number.
        is_shape = shapes.dtype(node.inputs[0]) == ir.DataType.INT64
        return [Dim(1, (("value", id(out)),))] if len(places) == 1 and is_shape else None
    if op == "Concat":
        whole = [part for part in parts if part is not None]
        return [d for part in whole for d in part] if len(whole) == len(parts) else None
    if first is None:
        return None
    if op in _PASSED_ON:
        passed: Dims = first
        return passed
    if op == "Slice":
        return sliced(first, parts[1:])
    second = parts[1] if len(parts) > 1 else None
    kind = shapes.dtype(node.inputs[0])
    if second is None or (op == "Div" and kind is not None and kind.is_floating_point()):
        return None  # a half is lost in whole numbers
    return arithmetic(op, first, second)
