"""Recognising a Linear layer (MatMul with a weight, optional bias Add) behind a value."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph

_LAYOUT = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Cast"})
_SCALES = frozenset({"Mul", "Div"})
_NORMS = frozenset({"RMSNormalization", "LayerNormalization"})
"""Over the features of a head, between a projection and its attention (QK normalization)."""


@dataclass(frozen=True)
class Linear:
    """``out = x @ W (+ bias)``; ``transposed`` says that W lies as ``[out, in]``, as in torch."""

    x: ir.Value
    out: ir.Value
    matmul: ir.Node
    weight_value: ir.Value
    weight: ir.TensorProtocol
    transposed: bool
    bias: ir.TensorProtocol | None
    nodes: tuple[ir.Node, ...]

    @property
    def out_features(self) -> int:
        """The size of the last axis of ``out``."""
        return int(self.weight.shape.numpy()[0 if self.transposed else 1])

    @property
    def label(self) -> str:
        """The module path of the layer, for messages."""
        return graph.module_path(self.matmul)


def behind(value: ir.Value | None) -> Linear | ir.Value | None:
    """The Linear that ``value`` is made from by layout, scale and norm, else where it stops."""
    while value is not None:
        if (linear := match(value)) is not None:
            return linear
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return value
        scaled = node.op_type in _SCALES and graph.scalar(node.inputs[1]) is not None
        if node.op_type not in _LAYOUT and node.op_type not in _NORMS and not scaled:
            return value
        value = node.inputs[0]
    return None


def joined(value: ir.Value | None) -> list[Linear | ir.Value | None]:
    """``behind`` each part of a value that is concatenated, in order; of another, just its own."""
    found = behind(value)
    concat = graph.producer(found, "Concat") if isinstance(found, ir.Value) else None
    if concat is None:
        return [found]
    return [one for part in concat.inputs for one in joined(part)]


def match(value: ir.Value) -> Linear | None:
    """The Linear that computes ``value``, or None."""
    node, bias, nodes = value.producer(), None, []
    if (add := graph.producer(value, "Add")) is not None:
        sides = [(add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])]
        for product, addend in sides:
            tensor = _parameter(addend, 1)
            if tensor is not None and (inner := graph.producer(product, "MatMul")) is not None:
                node, bias, nodes = inner, tensor, [add]
                break
    if node is None or node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    x, right = node.inputs
    transpose = graph.producer(right, "Transpose")
    source = transpose.inputs[0] if transpose is not None else right
    weight = _parameter(source, 2)
    if x is None or source is None or weight is None:
        return None
    nodes.append(node)
    if transpose is not None:
        nodes.append(transpose)
    return Linear(x, value, node, source, weight, transpose is not None, bias, tuple(nodes))


def _parameter(value: ir.Value | None, rank: int) -> ir.TensorProtocol | None:
    """The tensor of an initializer of that rank which no caller can override."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    tensor = value.const_value
    return tensor if tensor is not None and len(tensor.shape) == rank else None
