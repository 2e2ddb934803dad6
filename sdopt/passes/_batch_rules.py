"""How operators carry the batch from their inputs to their outputs, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _batch_layout
from sdopt.passes._batch_axes import Batch, Unproven, along, axis_of, spread

Rule = Callable[[ir.Node, Batch], None]

_UNARY = [
    "Abs",
    "Cast",
    "Ceil",
    "Clip",
    "Cos",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Sqrt",
    "Swish",
    "Tanh",
]
_BROADCAST = [
    "Add",
    "And",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
]
_PER_SAMPLE = [
    "AveragePool",
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNormalization",
    "InstanceNormalization",
    "LpPool",
    "MaxPool",
]
_OF_SEVERAL = {*_BROADCAST, "Attention", "Concat", "Einsum", "Gather", "Gemm", "MatMul"}
"""Operators that may hold the batch in other inputs than the first."""

_REDUCE = [
    f"Reduce{kind}" for kind in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
]


def follow(batch: Batch) -> None:
    """Carry what is known through the graph until nothing new comes out.

    Raises:
        Unproven: the batch meets an operator or a constant that it cannot be followed through.
    """
    while nodes := batch.touched():
        for node in nodes:
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is None:
                raise Unproven(f"nothing is known of {node.op_type} and batches", node)
            strays = [] if node.op_type in _OF_SEVERAL else node.inputs[1:]
            if any(batch.axis(value) is not None for value in strays):
                raise Unproven(f"{node.op_type} takes the batch for a parameter", node)
            rule(node, batch)
    for value, node in batch.origins:
        if batch.axis(value) is None:
            raise Unproven(f"its shape follows {value.name}, which does not hold the batch", node)


def _unary(node: ir.Node, batch: Batch) -> None:
    along(node, batch)


def _per_sample(node: ir.Node, batch: Batch) -> None:
    if len(node.outputs) > 1 or along(node, batch) != 0:
        raise Unproven(f"{node.op_type} mixes the batch with something else", node)


def _normalizes(node: ir.Node, batch: Batch) -> None:
    """Softmax over one axis (over all from it on before opset 13), or a norm from one axis on."""
    softmax = node.op_type.endswith("Softmax")
    old = softmax and batch.opset < 13
    first = axis_of(node, batch, 1 if old else -1)
    known = along(node, batch)
    if known is not None and (known == first or (known > first and (old or not softmax))):
        raise Unproven(f"{node.op_type} runs over the batch", node)


def _broadcast(node: ir.Node, batch: Batch) -> None:
    spread(node, batch, node.inputs, node.outputs[0])


def _matmul(node: ir.Node, batch: Batch) -> None:
    (a, b), out = node.inputs, node.outputs[0]
    if a is None or b is None:
        return
    ranks = [len(batch.sizes(value, node)) for value in (a, b, out)]
    if min(ranks[:2]) < 2:
        raise Unproven("MatMul of a vector", node)
    if batch.axis(a) == ranks[0] - 1 or batch.axis(b) == ranks[1] - 2:
        raise Unproven("MatMul sums over the batch", node)
    for value, back, rank in ((a, 2, ranks[0]), (b, 1, ranks[1])):
        if batch.axis(value) == rank - back:
            batch.mark(out, ranks[2] - back, node)
        if batch.axis(out) == ranks[2] - back:
            batch.mark(value, rank - back, node)
    spread(node, batch, (a, b), out, ends=2)


def _gemm(node: ir.Node, batch: Batch) -> None:
    a, out = node.inputs[0], node.outputs[0]
    rows = 1 if graph.attribute(node, "transA", 0) else 0
    if batch.axis(a) not in (rows, None) or batch.axis(node.inputs[1]) is not None:
        raise Unproven("Gemm mixes the batch with something else", node)
    if batch.axis(a) is not None:
        batch.mark(out, 0, node)
    if batch.axis(out) not in (0, None):
        raise Unproven("Gemm mixes the batch with something else", node)
    if batch.axis(out) == 0:
        batch.mark(a, rows, node)
    spread(node, batch, node.inputs[2:], out)


def _attention(node: ir.Node, batch: Batch) -> None:
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        raise Unproven("an attention with a cache", node)
    if along(node, batch, *node.inputs[1:3]) != 0:
        raise Unproven("Attention mixes the batch with something else", node)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None:
        sizes = batch.sizes(mask, node)
        if len(sizes) == 4 and sizes[0] != 1:
            batch.mark(mask, 0, node)


def _reduce(node: ir.Node, batch: Batch) -> None:
    first, out = node.inputs[0], node.outputs[0]
    if first is None:
        return
    rank = len(batch.sizes(first, node))
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = graph.constant(given) if given is not None else graph.attribute(node, "axes")
    if axes is None:
        raise Unproven(f"{node.op_type} runs over all axes, or over computed ones", node)
    gone = {int(axis) % rank for axis in axes}
    kept = [axis for axis in range(rank) if axis not in gone]
    places = list(range(rank)) if graph.attribute(node, "keepdims", 1) else kept
    if (axis := batch.axis(first)) is not None:
        if axis in gone:
            raise Unproven(f"{node.op_type} runs over the batch", node)
        batch.mark(out, places.index(axis), node)
    if (axis := batch.axis(out)) is not None:
        batch.mark(first, places[axis], node)


def _resize(node: ir.Node, batch: Batch) -> None:
    _per_sample(node, batch)
    if len(node.inputs) > 3 and node.inputs[3] is not None and not graph.attribute(node, "axes"):
        batch.halve_entry(node, 3, 0, node)


def _einsum(node: ir.Node, batch: Batch) -> None:
    equation = str(graph.attribute(node, "equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = [*left.split(","), right]
    values = [*node.inputs, node.outputs[0]]
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms):
        raise Unproven(f"Einsum {equation}", node)
    for term, value in zip(terms, values, strict=True):
        if (axis := batch.axis(value)) is None:
            continue
        letter = term[axis]
        if letter not in right:
            raise Unproven("Einsum sums over the batch", node)
        for other, each in zip(terms, values, strict=True):
            if letter in other:
                batch.mark(each, other.index(letter), node)


def _nothing(node: ir.Node, batch: Batch) -> None:
    """Its result is no part of the batch, or it has no inputs."""


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_PER_SAMPLE, _per_sample),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _normalizes),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalizes),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _batch_layout.regroups),
    **dict.fromkeys(("Shape", "Size", "Constant"), _nothing),
    **dict.fromkeys(("Concat", "Split"), _batch_layout.joins),
    "Attention": _attention,
    "ConstantOfShape": _batch_layout.fills,
    "Einsum": _einsum,
    "Expand": _batch_layout.expands,
    "Gather": _batch_layout.gathers,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _batch_layout.pads,
    "Resize": _resize,
    "Slice": _batch_layout.cuts,
    "Transpose": _batch_layout.transposes,
}
