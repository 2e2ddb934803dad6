"""What onnxruntime's CUDA-only operators compute, in standard operators, so that a CPU can check.

From their definitions in onnxruntime's contrib operator docs (ContribOperators.md, 1.31).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import PassContext

MICROSOFT = "com.microsoft"


def standard(model: ir.Model) -> int:
    """Replace every CUDA-only node by what its definition says; returns how many there were."""
    count, ctx = 0, PassContext(model)
    for node in list(model.graph):
        rule = _RULES.get(node.op_type) if node.domain == MICROSOFT else None
        if rule is None:
            continue
        made = rule(node, ctx.emitter(node, "standard"))
        for old, new in zip(node.outputs, made, strict=False):
            new.type, new.shape = old.type, old.shape
            graph.replace_uses(old, new)
        graph.remove_dead([node])
        count += 1
    return count


def _conv(node: ir.Node, emit: graph.Emitter) -> list[ir.Value]:
    kept = {name: attr.value for name, attr in node.attributes.items()}
    x = emit("Transpose", node.inputs[0], perm=[0, 3, 1, 2])
    weight = emit("Transpose", node.inputs[1], perm=[0, 3, 1, 2])
    y = emit("Conv", x, weight, *node.inputs[2:], **kept)
    return [emit("Transpose", y, perm=[0, 2, 3, 1])]


def _norm(node: ir.Node, x: ir.Value, emit: graph.Emitter) -> ir.Value:
    scale, bias = (emit("CastLike", value, x) for value in node.inputs[1:3])
    first = emit("Transpose", x, perm=[0, 3, 1, 2])
    y = emit(
        "GroupNormalization",
        *(first, scale, bias),
        num_groups=graph.attribute(node, "groups"),
        epsilon=graph.attribute(node, "epsilon"),
    )
    if graph.attribute(node, "activation"):
        y = emit("Mul", y, emit("Sigmoid", y))
    return emit("Transpose", y, perm=[0, 2, 3, 1])


def _group_norm(node: ir.Node, emit: graph.Emitter) -> list[ir.Value]:
    x = node.inputs[0]
    assert x is not None
    assert graph.attribute(node, "channels_last") == 1
    return [_norm(node, x, emit)]


def _skip_group_norm(node: ir.Node, emit: graph.Emitter) -> list[ir.Value]:
    x, _, _, skip, *bias = node.inputs
    total = emit("Add", x, skip)
    if bias:
        total = emit("Add", total, bias[0])
    return [_norm(node, total, emit), total]


def _bias_split_gelu(node: ir.Node, emit: graph.Emitter) -> list[ir.Value]:
    total = emit("Add", node.inputs[0], node.inputs[1])
    left, right = emit.many("Split", total, outputs=2, axis=-1, num_outputs=2)
    return [emit("Mul", left, emit("Gelu", right))]


_RULES: dict[str, Callable[[ir.Node, graph.Emitter], list[ir.Value]]] = {
    "NhwcConv": _conv,
    "GroupNorm": _group_norm,
    "SkipGroupNorm": _skip_group_norm,
    "BiasSplitGelu": _bias_split_gelu,
}

Arrays = dict[str, np.ndarray]
