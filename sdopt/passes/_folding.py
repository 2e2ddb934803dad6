"""Evaluating nodes whose inputs are small constants, bit for bit as a runtime would."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sdopt import graph

_EXACT_OPS = frozenset(
    {"Abs", "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand"}
    | {"Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less"}
    | {"LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd"}
    | {"Reshape", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze"}
    | {"Where", "Xor"}
)
"""Operators that every runtime agrees on to the bit; exp, sin and pow are not among them."""


def static_dims(value: ir.Value | None) -> list[int] | None:
    """The dimensions of a value if all of them are known numbers."""
    if value is None or value.shape is None:
        return None
    dims = [dim for dim in value.shape if isinstance(dim, int)]
    return dims if len(dims) == len(value.shape) else None


def fold(node: ir.Node, opset: int) -> list[np.ndarray] | None:
    """The node's outputs as arrays if they are known now and small, else None."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Constant":
        tensor = graph.constant_tensor(node)
        small = tensor is not None and tensor.size <= graph.SMALL_ELEMENTS
        return [tensor.numpy()] if small and tensor is not None else None
    if node.op_type in ("Shape", "Size"):
        return _fold_shape(node)
    if node.op_type not in _EXACT_OPS or any(a.is_ref() for a in node.attributes.values()):
        return None
    if any(value is not None and _is_weight(value) for value in node.inputs):
        return None
    arrays = {v.name or "": graph.constant(v) for v in node.inputs if v is not None}
    feeds = {name: array for name, array in arrays.items() if array is not None}
    if len(feeds) != len(arrays):
        return None
    # One value may be read twice (Range(0, 4, 4)), so sizes go by input and not by name.
    if not _is_small(node, [feeds[v.name or ""] for v in node.inputs if v is not None]):
        return None
    if node.op_type in ("Div", "Mod") and not np.all(feeds[node.inputs[1].name or ""]):  # type: ignore[union-attr]
        return None
    evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset})
    try:
        with np.errstate(all="ignore"):  # what overflows here overflows in the graph as well
            return [np.asarray(result) for result in evaluator.run(None, feeds)]
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # operands that do not fit each other: no runtime computes it either


def _is_weight(value: ir.Value) -> bool:
    """A parameter, however small: folding it would rewrite the checkpoint's tensor."""
    tensor = value.const_value
    if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
        return True
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1


def _is_small(node: ir.Node, arrays: list[np.ndarray]) -> bool:
    """Whether the result of a node that can grow its inputs stays small."""
    if node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
        if node.op_type == "Range":
            start, limit, delta = (float(array) for array in arrays)
            size = (limit - start) / delta if delta else math.inf
        else:
            size = float(np.prod(arrays[-1].astype(np.float64)))
            size *= arrays[0].size if node.op_type == "Tile" else 1
        return size <= graph.SMALL_ELEMENTS
    return sum(array.size for array in arrays) <= 4 * graph.SMALL_ELEMENTS


def _fold_shape(node: ir.Node) -> list[np.ndarray] | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    if node.op_type == "Size":
        dims = static_dims(value)
        return None if dims is None else [np.array(math.prod(dims), np.int64)]
    start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end")
    wanted = list(value.shape)[slice(start, end)]
    dims = [dim for dim in wanted if isinstance(dim, int)]
    return [np.array(dims, np.int64)] if len(dims) == len(wanted) else None
