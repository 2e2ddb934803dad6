"""``lower_group_norm``: GroupNormalization as two kernels that onnxruntime's CPU has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes.base import Numerics, Pass, PassContext

Statistics = dict[tuple[int, ir.DataType], tuple[ir.Value, ir.Value]]
"""Mean 0 and variance 1 by channels and dtype, shared by the norms of a graph."""

PER_CHANNEL_OPSET = 21
"""Before it GroupNormalization took one scale per group; since then one per channel."""


@dataclass(frozen=True)
class LowerGroupNorm(Pass):
    """Write GroupNormalization as InstanceNormalization over groups and one affine pass.

    Before / After:
        GroupNormalization(x, scale, bias)  ->  Reshape(x, [0, groups, -1])
                                                InstanceNormalization(1, 0)
                                                Reshape(Shape(x))
                                                BatchNormalization(scale, bias, mean 0, variance 1)

    Applies when: scale and bias are weights of ``[C]`` (opset 21 and later). In half precision the
    normalisation runs in float32 between two Casts, as ``stash_type`` 1 says.

    Numerics: reassociated (the kernels sum in another order than the operator's function body).

    Options: none.

    Counts: ``group_norm``.

    Why this form: onnxruntime 1.31 has no GroupNormalization kernel and runs the operator's
    function body, five element-wise passes over the tensor. InstanceNormalization is one threaded
    kernel, and BatchNormalization with the statistics 0 and 1 is scale and bias in one pass, where
    Mul and Add are two. Measured by ``benchmarks/lowering.py``, [2, C, S, S], 32 groups, CPU time
    over that of the function body (lower is better):

        C x S x S       this    Mul, Add    LayerNormalization    mean and variance by hand
        64 x 32 x 32    0.41    0.50        0.59                  0.72
        64 x 64 x 64    0.28    0.39        0.44                  0.68
        256 x 16 x 16   0.40    0.49        0.58                  0.72
        320 x 64 x 64   0.36    0.49        0.51                  0.67

    Example:
        sdopt build BUNDLE --target ort
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "cast_fp16",
        "cast_bf16",
        "tome",
        "pad_align",
    )

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Lower every GroupNormalization of the main graph."""
        statistics: Statistics = {}
        for node in list(model.graph):
            if node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx"):
                if reason := _unsupported(node, graph.opset(model)):
                    ctx.skip(reason, node, "group_norm")
                    continue
                _lower(node, statistics, ctx)
                ctx.count("group_norm")


def _unsupported(node: ir.Node, opset: int) -> str | None:
    if opset < PER_CHANNEL_OPSET:
        return f"opset {opset} scales each group, not each channel"
    for value, what in zip(node.inputs[1:3], ("scale", "bias"), strict=True):
        if value is None or value.const_value is None or value.is_graph_input():
            return f"its {what} is computed, not a weight"
    return None


def _lower(node: ir.Node, statistics: Statistics, ctx: PassContext) -> None:
    x, scale, bias = (value for value in node.inputs[:3] if value is not None)
    out, dtype = node.outputs[0], _tensor(scale).dtype
    groups = int(graph.attribute(node, "num_groups"))
    emit = ctx.emitter(node, f"{graph.module_path(node)}/lower_group_norm")
    half = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    kind = ir.DataType.FLOAT if half else dtype
    data = emit("Cast", x, to=int(kind)) if half else x
    if half:
        scale = emit.weight(weights.cast(_tensor(scale), kind), "scale")
        bias = emit.weight(weights.cast(_tensor(bias), kind), "bias")
    normal = emit(
        "InstanceNormalization",
        emit("Reshape", data, emit.const([0, groups, -1])),
        emit.const(np.ones(groups), kind.numpy()),
        emit.const(np.zeros(groups), kind.numpy()),
        epsilon=float(graph.attribute(node, "epsilon", 1e-5)),
    )
    restored = emit("Reshape", normal, emit("Shape", x))
    channels = int(_tensor(scale).shape.numpy()[0])
    if (channels, kind) not in statistics:
        mean = emit.weight(weights.full([channels], 0.0, kind), "mean")
        variance = emit.weight(weights.full([channels], 1.0, kind), "variance")
        statistics[channels, kind] = (mean, variance)
    result = emit(
        "BatchNormalization", restored, scale, bias, *statistics[channels, kind], epsilon=0.0
    )
    if half:
        result = emit("Cast", result, to=int(dtype))
    result.type, result.shape = out.type, out.shape
    graph.replace_uses(out, result)
    graph.remove_dead([node])


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise TypeError(f"{value.name} is not a weight")
    return value.const_value
