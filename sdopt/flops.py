"""Floating-point operations of a graph at stated sizes, counted from its operators and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sdopt import graph
from sdopt.shapes import number_of

Shape = tuple[int, ...]

SIZES: Mapping[str, int] = {
    "batch_size": 2,
    "height": 64,
    "width": 64,
    "sequence_length": 77,
}
"""A step of Stable Diffusion 1.x at 512x512 pixels with classifier-free guidance."""


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """``SIZES`` at the latent size that a denoiser's configuration says it was trained at."""
    size = config.get("sample_size") or SIZES["height"]
    height, width = size if isinstance(size, list) else (size, size)
    return {**SIZES, "height": height, "width": width}


def stated(sizes: Mapping[str, int]) -> str:
    """Those sizes in words, for a report."""
    return (
        f"latent {sizes['height']}x{sizes['width']}, batch {sizes['batch_size']}, "
        f"{sizes['sequence_length']} tokens"
    )


_STANDARD = ("", "ai.onnx")
_COUNTED = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "MultiHeadAttention"}
)
_SAME_SHAPE = frozenset({"GroupNormalization", "Gelu", "Swish", "Mish", "HardSwish"})
"""Functions for which onnx 1.23 infers nothing; each gives the shape of its first input."""

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class Flops:
    """What a graph costs.

    ``by_node`` are the operations of each MatMul, Gemm, Conv, ConvTranspose and attention, a
    multiplication and an addition counting as two; other operators are not counted. ``unknown``
    are those among them whose shapes could not be found out.
    """

    by_node: Mapping[ir.Node, int]
    unknown: tuple[ir.Node, ...]

    @property
    def total(self) -> int:
        """The sum over all nodes."""
        return sum(self.by_node.values())


def count(model: ir.Model, sizes: Mapping[str, int] = SIZES) -> Flops:
    """Count the main graph's operations; no weight is read, bodies of If and Loop are left out.

    Args:
        model: of any opset; attention may be the standard operator or com.microsoft's.
        sizes: of dynamic dimensions by name; those that are not named count as 1.
    """
    known = shapes(model, sizes)
    by_node: dict[ir.Node, int] = {}
    unknown = []
    for node in model.graph:
        if node.op_type not in _COUNTED:
            continue
        operands = [known.get(value) for value in (*node.inputs[:2], node.outputs[0]) if value]
        if len(operands) < 3 or any(shape is None for shape in operands):
            unknown.append(node)
        else:
            first, second, out = (shape or () for shape in operands)
            by_node[node] = _operations(node, first, second, out)
    return Flops(by_node, tuple(unknown))


def _operations(node: ir.Node, first: Shape, second: Shape, out: Shape) -> int:
    size = math.prod(out)
    match node.op_type:
        case "MatMul":
            return 2 * size * first[-1]
        case "Gemm":
            return 2 * size * first[0 if graph.attribute(node, "transA", 0) else 1]
        case "Conv":  # the weight is [out, in / group, *kernel]
            return 2 * size * math.prod(second[1:])
        case "ConvTranspose":  # the weight is [in, out / group, *kernel]
            return 2 * math.prod(first) * math.prod(second[1:])
    # Attention: each of the Sq x Sk scores is a dot product of q with k, and weighs a row of v.
    return 2 * second[-2] * (math.prod(first) + size)


def shapes(model: ir.Model, sizes: Mapping[str, int] = SIZES) -> dict[ir.Value, Shape]:
    """The shape of every value of the main graph whose shape follows from ``sizes``.

    onnx's shape inference is asked node by node, and shape arithmetic is computed on the way.
    """
    walk = _Walk(model)
    for value in model.graph.inputs:
        if value.shape is not None and value.dtype is not None:
            dims = [d if isinstance(d, int) else _size(str(d.value), sizes) for d in value.shape]
            walk.put(value, value.dtype, tuple(dims))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            walk.put(value, tensor.dtype, tuple(tensor.shape.numpy()))
            if tensor.dtype in _INTEGERS and not value.is_graph_input():
                walk.data[value] = graph.constant(value)
    for node in model.graph:
        walk.visit(node)
    return walk.shapes


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    try:
        return number_of(axis, sizes)
    except KeyError:
        return 1


class _Walk:
    """Shapes, types and the small integers that are known so far."""

    def __init__(self, model: ir.Model) -> None:
        self.shapes: dict[ir.Value, Shape] = {}
        self.data: dict[ir.Value, np.ndarray | None] = {}
        self._types: dict[ir.Value, onnx.TypeProto] = {}
        self._opset = graph.opset(model)

    def put(self, value: ir.Value, dtype: ir.DataType, shape: Shape) -> None:
        self.shapes[value] = shape
        self._types[value] = onnx.helper.make_tensor_type_proto(int(dtype), shape)

    def visit(self, node: ir.Node) -> None:
        """Find out what a node's outputs look like and, of shape arithmetic, what they hold."""
        if node.domain not in _STANDARD:
            self._microsoft(node)
            return
        if node.op_type == "Shape" and node.inputs[0] in self.shapes:
            part = slice(graph.attribute(node, "start", 0), graph.attribute(node, "end"))
            self._hold(node.outputs[0], np.array(self.shapes[node.inputs[0]][part], np.int64))
            return
        if node.op_type == "Constant" and (tensor := graph.constant_tensor(node)) is not None:
            self.put(node.outputs[0], tensor.dtype, tuple(tensor.shape.numpy()))
            self.data[node.outputs[0]] = graph.constant(node.outputs[0])
            return
        if self._compute(node) or any(v is not None and v not in self._types for v in node.inputs):
            return
        first = node.inputs[0] if node.inputs else None
        if node.op_type in _SAME_SHAPE and first in self.shapes and first is not None:
            dtype = ir.DataType(self._types[first].tensor_type.elem_type)
            self.put(node.outputs[0], dtype, self.shapes[first])
        else:
            self._infer(node)

    def _microsoft(self, node: ir.Node) -> None:
        """MultiHeadAttention of ``[B, S, heads * D]`` operands; what else there is, is unknown."""
        if node.op_type == "MultiHeadAttention":
            q, _, v = node.inputs[:3]
            if q in self.shapes and v in self.shapes and q is not None and v is not None:
                dtype = ir.DataType(self._types[q].tensor_type.elem_type)
                self.put(node.outputs[0], dtype, (*self.shapes[q][:2], self.shapes[v][-1]))

    def _hold(self, value: ir.Value, array: np.ndarray) -> None:
        self.put(value, ir.DataType.from_numpy(array.dtype), array.shape)
        self.data[value] = array

    def _compute(self, node: ir.Node) -> bool:
        """Compute a node all of whose operands are small known integers."""
        values = [value for value in node.inputs if value is not None]
        arrays = {value.name or "": self.data.get(value) for value in values}
        feeds = {name: array for name, array in arrays.items() if array is not None}
        small = all(array.size <= graph.SMALL_ELEMENTS for array in feeds.values())
        if not values or len(feeds) < len(arrays) or not small or node.op_type in _COUNTED:
            return False
        found = ReferenceEvaluator(ir.to_proto(node), opsets={"": self._opset}).run(None, feeds)
        for value, array in zip(node.outputs, found, strict=True):
            self._hold(value, np.asarray(array))
        return True

    def _infer(self, node: ir.Node) -> None:
        if not onnx.defs.has(node.op_type, ""):
            return
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        values = {value.name or "": value for value in node.inputs if value is not None}
        data = {
            name: onnx.numpy_helper.from_array(array, name)
            for name, value in values.items()
            if (array := self.data.get(value)) is not None
        }
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema,
                ir.to_proto(node),
                {name: self._types[value] for name, value in values.items()},
                data,
                opset_imports=[onnx.helper.make_opsetid("", self._opset)],
            )
        except onnx.shape_inference.InferenceError:
            return  # sizes that do not fit the graph: what follows is unknown
        for value in node.outputs:
            if value.name not in found:
                continue
            self._types[value] = found[value.name]
            tensor = found[value.name].tensor_type
            if not tensor.HasField("shape"):
                continue  # a sequence, or a size that its operands do not tell
            dims = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
            if len(dims) == len(tensor.shape.dim):
                self.put(value, ir.DataType(tensor.elem_type), tuple(dims))
