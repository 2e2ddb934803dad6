"""``lower_channels_last``: convolutions and group norms as ONNX Runtime's NHWC kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._layout import Layout
from sdopt.passes.base import Numerics, Pass, PassContext

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class LowerChannelsLast(Pass):
    """Write Conv and GroupNormalization channels-last, and everything between them too.

    Before / After:
        Conv(x, W)                               ->  NhwcConv(x, W as [O, kH, kW, I])
        GroupNormalization(x), Sigmoid, Mul      ->  GroupNorm(x, activation=1)
        Add, Mul, Concat, Resize, Pad, Shape     ->  the same on [B, H, W, C]
        Transpose to [B, H, W, C]                ->  nothing: it lies so already

    Applies when: the operands are 4-D, the kernel is a weight and the norm's scale and bias are
    weights of ``[C]``. Transposes stay only where something else reads ``[B, C, H, W]``, at the
    graph's image inputs and outputs. The kernels are onnxruntime's for CUDA; scale and bias are
    written in float32, as its GroupNorm takes them.

    Numerics: reassociated.

    Options: none.
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "pad_align",
        "tome",
        "cast_fp16",
        "cast_bf16",
    )

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Lower the main graph in one sweep, producers first."""
        layout = Layout(ctx, self.name())
        for node in list(model.graph):
            if node.graph is None or node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "Conv":
                done = _convolution(node, layout, ctx)
            elif node.op_type == "GroupNormalization":
                done = _group_norm(node, layout, ctx)
            else:
                if node.op_type == "Transpose":
                    layout.enter(node)
                layout.carry(node)
                continue
            if done:
                model.opset_imports[MICROSOFT] = 1
        left = layout.finish()
        if ctx.rewrites:
            ctx.note(f"{left} transposes back to channels-first are left")


def _convolution(node: ir.Node, layout: Layout, ctx: PassContext) -> bool:
    x, kernel, *bias = node.inputs
    tensor = kernel.const_value if kernel is not None and not kernel.is_graph_input() else None
    if x is None or tensor is None:
        ctx.skip("its kernel is computed, not a weight", node, "conv")
        return False
    if len(tensor.shape) != 4:
        ctx.skip("it is not a 2-D convolution", node, "conv")
        return False
    emit = layout.emitter(node)
    weight = emit.weight(weights.channels_last(tensor), "weight_nhwc")
    kept = {name: attr.value for name, attr in node.attributes.items()}
    made = emit("NhwcConv", layout.last(x, emit), weight, *bias, domain=MICROSOFT, **kept)
    layout.replace(node.outputs[0], made, emit)
    ctx.count("conv")
    return True


def _group_norm(node: ir.Node, layout: Layout, ctx: PassContext) -> bool:
    x, scale, bias = node.inputs[:3]
    if x is None or graph.rank(x) != 4:
        ctx.skip("its input is not known to be 4-D", node, "group_norm")
        return False
    tensors = [v.const_value for v in (scale, bias) if v is not None and not v.is_graph_input()]
    if len(tensors) != 2 or None in tensors:
        ctx.skip("its scale or bias is computed, not a weight", node, "group_norm")
        return False
    emit, out = layout.emitter(node), node.outputs[0]
    wide = [
        emit.weight(weights.cast(tensor, ir.DataType.FLOAT), name)
        for tensor, name in zip(tensors, ("scale", "bias"), strict=True)
        if tensor is not None
    ]
    silu = _silu(out)
    made = emit(
        "GroupNorm",
        layout.last(x, emit),
        *wide,
        domain=MICROSOFT,
        groups=int(graph.attribute(node, "num_groups")),
        epsilon=float(graph.attribute(node, "epsilon", 1e-5)),
        activation=int(silu is not None),
        channels_last=1,
    )
    layout.replace(out if silu is None else silu, made, emit)
    ctx.count("group_norm")
    return True


def _silu(value: ir.Value) -> ir.Value | None:
    """``value * sigmoid(value)`` if that is all that is read of ``value``."""
    users = list(value.consumers())
    sigmoid = next((user for user in users if user.op_type == "Sigmoid"), None)
    product = next((user for user in users if user.op_type == "Mul"), None)
    if sigmoid is None or product is None or len(users) != 2 or value.is_graph_output():
        return None
    gate = sigmoid.outputs[0]
    alone = graph.single_consumer(gate) is product
    return product.outputs[0] if alone and set(product.inputs) == {value, gate} else None
