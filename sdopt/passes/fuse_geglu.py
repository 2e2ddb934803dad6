"""``fuse_geglu``: GEGLU and the bias before it as onnxruntime's BiasSplitGelu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes.base import Numerics, Pass, PassContext

MICROSOFT = "com.microsoft"

WIDTHS = (2560, 5120, 10240)
"""The widths of the projection that onnxruntime 1.31's CUDA kernel is compiled for."""


@dataclass(frozen=True)
class FuseGeglu(Pass):
    """Write the bias, the halves, GELU and their product as one BiasSplitGelu.

    Before / After:
        p = Add(x, bias); a, b = Split(p); Mul(a, Gelu(b))  ->  BiasSplitGelu(x, bias)

    Applies when: the halves are those of one projection over the last axis, the second one goes
    through an exact GELU, and the projection is 2560, 5120 or 10240 wide, which is what
    onnxruntime's CUDA kernel is compiled for.

    Numerics: reassociated.

    Options: none.
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = ("clean", "raise_ops", "cast_fp16", "cast_bf16")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Fuse every GEGLU of the main graph."""
        for node in list(model.graph):
            if node.op_type != "Gelu" or node.domain not in ("", "ai.onnx"):
                continue
            split = graph.producer(node.inputs[0], "Split")
            product = graph.single_consumer(node.outputs[0])
            if split is None or product is None or product.op_type != "Mul":
                continue
            if reason := _fuse(split, node, product, ctx):
                ctx.skip(reason, node, "geglu")
            else:
                model.opset_imports[MICROSOFT] = 1
                ctx.count("geglu")


def _fuse(split: ir.Node, gelu: ir.Node, product: ir.Node, ctx: PassContext) -> str | None:
    """Fuse, or say why not."""
    source, halves = split.inputs[0], split.outputs
    if len(halves) != 2 or source is None:
        return f"its Split has {len(halves)} outputs"
    other = [value for value in product.inputs if value is not gelu.outputs[0]]
    if gelu.inputs[0] is not halves[1] or other != [halves[0]]:
        return "its halves are not the value and the gate of one projection"
    if any(graph.single_consumer(half) is None for half in halves):
        return "its halves are read by something else too"
    if graph.attribute(gelu, "approximate", "none") != "none":
        return "its GELU is the tanh approximation; the kernel computes the exact one"
    rank = graph.rank(source)
    if rank != 3 or graph.attribute(split, "axis", 0) not in (-1, 2):
        return "its projection is not [B, S, D] split over D"
    width = graph.static_dim(source, 2)
    if width not in WIDTHS or graph.static_dim(halves[0], 2) != width // 2:
        return f"its projection is {width} wide; the kernel takes {', '.join(map(str, WIDTHS))}"
    emit = ctx.emitter(split, f"{graph.module_path(product)}/fuse_geglu")
    x, bias = _bias(source)
    if bias is None:
        dtype = source.dtype or ir.DataType.FLOAT
        bias = emit.weight(weights.full([width], 0.0, dtype), "no_bias")
    made, out = emit("BiasSplitGelu", x, bias, domain=MICROSOFT), product.outputs[0]
    made.type, made.shape = out.type, out.shape
    graph.replace_uses(out, made)
    graph.remove_dead([product])
    return None


def _bias(source: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The projection before its bias, and the bias."""
    add = graph.producer(source, "Add")
    if add is not None and graph.single_consumer(source) is not None:
        for x, bias in (add.inputs[:2], add.inputs[1::-1]):
            tensor = bias.const_value if bias is not None and not bias.is_graph_input() else None
            if x is not None and tensor is not None and len(tensor.shape) == 1:
                return x, bias
    return source, None
