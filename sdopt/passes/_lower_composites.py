"""Operators that came late, written as what their definitions say, for ``lower_opset``.

Each in the spelling that torch's exporters used before the operator existed, because that is what
the fusions of older compilers look for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes import _lower_functions
from sdopt.passes._attention import HALVES, attentions, read
from sdopt.passes._attention_decomposed import write_decomposed
from sdopt.passes._lower_rules import Rules, has_opset, refused

Rule = Callable[[Rules, ir.Node], None]


def compose(rules: Rules) -> None:
    """Write every operator that the opset lacks with those of the graph's own opset."""
    if rules.crosses(23):
        for node in attentions(rules.model):
            call = read(node, rules.shapes)
            if isinstance(call, str):
                raise refused(rules, node, call, least=23)
            rules.mark(node)
            write_decomposed(call, "lower_opset", rules.shapes, rules.ctx)
    for node in list(graph.nodes(rules.model)):
        if node.domain not in ("", "ai.onnx") or node.graph is None:
            continue
        version, rule = RULES.get(node.op_type, (0, None))
        if rule is not None and rules.crosses(version):
            rule(rules, node)
    _lower_functions.inline(rules, {name for name in _late(rules) if name not in RULES})


def _late(rules: Rules) -> set[str]:
    names = {n.op_type for n in graph.nodes(rules.model) if n.domain in ("", "ai.onnx")}
    return {name for name in names if onnx.defs.has(name) and not has_opset(name, rules.opset)}


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _x(rules: Rules, node: ir.Node) -> tuple[ir.Value, ir.DataType]:
    """The first input and its element type."""
    x, dtype = node.inputs[0], rules.shapes.dtype(node.inputs[0])
    if x is None or dtype is None:
        raise refused(rules, node, "the element type of its input is not known")
    return x, dtype


def _mean(rules: Rules, emit: graph.Emitter, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    if rules.given >= 18:
        return emit("ReduceMean", x, emit.const(list(axes)))
    return emit("ReduceMean", x, axes=list(axes))


def _axes(rules: Rules, node: ir.Node) -> list[int]:
    """The axes that a norm goes over: all from ``axis`` on."""
    axis = int(graph.attribute(node, "axis", -1))
    if axis < 0:
        return list(range(axis, 0))
    rank = rules.rank(node.inputs[0])
    if rank is None:
        raise refused(rules, node, "the number of axes of its input is not known")
    return list(range(axis, rank))


def _in_float(
    node: ir.Node, x: ir.Value, dtype: ir.DataType, emit: graph.Emitter
) -> tuple[ir.Value, bool]:
    """``x`` in the type that statistics are computed in, and whether that is another."""
    wide = dtype in HALVES and graph.attribute(node, "stash_type", 1) == ir.DataType.FLOAT
    return (emit("Cast", x, to=int(ir.DataType.FLOAT)) if wide else x), wide


def _norm(rules: Rules, node: ir.Node, *, centered: bool) -> None:
    used = [out for out in node.outputs[1:] if out.uses() or out.is_graph_output()]
    if used:
        raise refused(rules, node, "its statistics are read", least=17)
    x, dtype = _x(rules, node)
    emit, axes = rules.emit(node), _axes(rules, node)
    data, wide = _in_float(node, x, dtype, emit)
    kind = np.float32 if wide else dtype.numpy()
    if centered:
        data = emit("Sub", data, _mean(rules, emit, data, axes))
    spread = _mean(rules, emit, emit("Pow", data, emit.const(2, kind)), axes)
    epsilon = emit.const(graph.attribute(node, "epsilon", 1e-5), kind)
    normal = emit("Div", data, emit("Sqrt", emit("Add", spread, epsilon)))
    if wide:
        normal = emit("Cast", normal, to=int(dtype))
    result = emit("Mul", normal, node.inputs[1])
    bias = _input(node, 2) if centered else None
    rules.replace(node, emit("Add", result, bias) if bias is not None else result)


def _layer_norm(rules: Rules, node: ir.Node) -> None:
    _norm(rules, node, centered=True)


def _rms_norm(rules: Rules, node: ir.Node) -> None:
    _norm(rules, node, centered=False)


def _group_norm(rules: Rules, node: ir.Node) -> None:
    if rules.given < 21:
        raise refused(rules, node, f"opset {rules.given} scales groups: raise_ops first")
    (x, dtype), dims = _x(rules, node), rules.shapes.dims(node.inputs[0])
    if dims is None:
        raise refused(rules, node, "the number of axes of its input is not known", least=21)
    emit, groups = rules.emit(node), int(graph.attribute(node, "num_groups"))
    data, wide = _in_float(node, x, dtype, emit)
    kind = np.float32 if wide else dtype.numpy()
    known = [dim.known for dim in dims]
    shape = emit.const(known) if None not in known else emit("Shape", x)
    normal = emit(
        "InstanceNormalization",
        emit("Reshape", data, emit.const([0, groups, -1])),
        emit.const(np.ones(groups), kind),
        emit.const(np.zeros(groups), kind),
        epsilon=float(graph.attribute(node, "epsilon", 1e-5)),
    )
    normal = emit("Reshape", normal, shape)
    if wide:
        normal = emit("Cast", normal, to=int(dtype))
    column = [-1] + [1] * (len(dims) - 2)
    scale, bias = (_column(value, column, emit) for value in node.inputs[1:3])
    rules.replace(node, emit("Add", emit("Mul", normal, scale), bias))


def _column(value: ir.Value | None, shape: list[int], emit: graph.Emitter) -> ir.Value:
    """A number per channel so that it broadcasts; a weight stays a range of its file."""
    if value is None:
        raise TypeError("a GroupNormalization has a scale and a bias")
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        return emit("Reshape", value, emit.const(shape))
    size = [tensor.size if one == -1 else one for one in shape]
    return emit.weight(weights.reshaped(tensor, size), (value.name or "weight").rsplit("/", 1)[-1])


def _gelu(rules: Rules, node: ir.Node) -> None:
    (x, dtype), emit = _x(rules, node), rules.emit(node)
    kind = dtype.numpy()
    if graph.attribute(node, "approximate", "none") == "tanh":
        cube = emit("Mul", emit("Pow", x, emit.const(3, kind)), emit.const(0.044715, kind))
        inner = emit("Mul", emit("Add", x, cube), emit.const(math.sqrt(2 / math.pi), kind))
        gate = emit("Tanh", inner)
    else:
        gate = emit("Erf", emit("Div", x, emit.const(math.sqrt(2), kind)))
    product = emit("Mul", x, emit("Add", gate, emit.const(1, kind)))
    rules.replace(node, emit("Mul", product, emit.const(0.5, kind)))


def _swish(rules: Rules, node: ir.Node) -> None:
    (x, dtype), emit = _x(rules, node), rules.emit(node)
    alpha = float(graph.attribute(node, "alpha", 1.0))
    scaled = x if alpha == 1 else emit("Mul", x, emit.const(alpha, dtype.numpy()))
    rules.replace(node, emit("Mul", x, emit("Sigmoid", scaled)))


def _mish(rules: Rules, node: ir.Node) -> None:
    (x, _), emit = _x(rules, node), rules.emit(node)
    rules.replace(node, emit("Mul", x, emit("Tanh", emit("Softplus", x))))


def _hard_swish(rules: Rules, node: ir.Node) -> None:
    (x, _), emit = _x(rules, node), rules.emit(node)
    rules.replace(node, emit("Mul", x, emit("HardSigmoid", x, alpha=1 / 6, beta=0.5)))


def _celu(rules: Rules, node: ir.Node) -> None:
    (x, dtype), emit = _x(rules, node), rules.emit(node)
    alpha = emit.const(graph.attribute(node, "alpha", 1.0), dtype.numpy())
    rules.replace(node, emit("Mul", emit("Elu", emit("Div", x, alpha), alpha=1.0), alpha))


def _cast_like(rules: Rules, node: ir.Node) -> None:
    dtype, emit = rules.shapes.dtype(node.inputs[1]), rules.emit(node)
    if dtype is None:
        raise refused(rules, node, "the type that it casts to is not known", least=15)
    rules.replace(node, emit("Cast", node.inputs[0], to=int(dtype)))


def _or_equal(rules: Rules, node: ir.Node) -> None:
    emit = rules.emit(node)
    strict = emit(node.op_type.removesuffix("OrEqual"), *node.inputs)
    rules.replace(node, emit("Or", strict, emit("Equal", *node.inputs)))


def _trilu(rules: Rules, node: ir.Node) -> None:
    """``k`` to the right of the diagonal of the last two axes, by the numbers of both."""
    (x, dtype), emit = _x(rules, node), rules.emit(node)
    shape = emit("Shape", x)
    counts = []
    for axis in (-2, -1):
        length = emit("Gather", shape, emit.const(axis), axis=0)
        counts.append(emit("Range", emit.const(0), length, emit.const(1)))
    rows = emit("Reshape", counts[0], emit.const([-1, 1]))
    distance = emit("Sub", counts[1], rows)
    k = _input(node, 1) or emit.const(0)
    outside = "Less" if graph.attribute(node, "upper", 1) else "Greater"
    zero = emit.const(0, dtype.numpy())
    rules.replace(node, emit("Where", emit(outside, distance, k), zero, x))


RULES: dict[str, tuple[int, Rule]] = {
    "LayerNormalization": (17, _layer_norm),
    "RMSNormalization": (23, _rms_norm),
    "GroupNormalization": (21, _group_norm),
    "Gelu": (20, _gelu),
    "Swish": (24, _swish),
    "Mish": (18, _mish),
    "HardSwish": (14, _hard_swish),
    "Celu": (12, _celu),
    "CastLike": (15, _cast_like),
    "GreaterOrEqual": (12, _or_equal),
    "LessOrEqual": (12, _or_equal),
    "Trilu": (14, _trilu),
}
"""Operator to the opset that brought it, in today's meaning, and what it is written as before."""
