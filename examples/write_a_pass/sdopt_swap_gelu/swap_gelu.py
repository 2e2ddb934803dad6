"""``swap_gelu=tanh``: writes GELU in one of its two cheaper forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class SwapGelu(Pass):
    """Write exact GELUs, which need erf, in the form that an accelerator has a kernel for.

    Before / After:
        Gelu(x)  ->  Gelu<approximate="tanh">(x)      swap_gelu=tanh
        Gelu(x)  ->  Mul(x, Sigmoid(Mul(x, 1.702)))   swap_gelu=sigmoid

    Applies when: the node is the standard Gelu with ``approximate`` "none", and for sigmoid the
    type of x is known.

    Numerics: lossy; one GELU moves by at most 5e-4 (tanh) or 2.1e-2 (sigmoid), whatever x is.

    Options:
        form: ``tanh`` or ``sigmoid``.

    Counts: ``gelu``; a Gelu in its tanh form is done already.

    Example:
        sdopt optimize model.onnx -o out.onnx --passes clean,swap_gelu=tanh --require gelu=all
    """

    form: Literal["tanh", "sigmoid"]

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("raise_ops",)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Swap every exact Gelu of the graph and of its subgraphs."""
        for node in list(graph.nodes(model)):
            if node.op_type != "Gelu" or node.domain not in ("", "ai.onnx"):
                continue
            approximate = graph.attribute(node, "approximate", "none")
            if approximate != "none":
                ctx.already("gelu")  # so a second application changes nothing
                continue
            if self.form == "tanh":
                node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
            elif not _write_with_sigmoid(node, ctx):
                continue
            ctx.count("gelu")


def _write_with_sigmoid(node: ir.Node, ctx: PassContext) -> bool:
    x, out = node.inputs[0], node.outputs[0]
    if x is None or x.dtype is None:
        ctx.skip("the type of its input is not known", node, kind="gelu")
        return False
    emit = ctx.emitter(node, graph.module_path(node))
    inner = emit("Mul", x, emit.const(1.702, x.dtype.numpy()))
    result = emit("Mul", x, emit("Sigmoid", inner))
    result.type, result.shape = out.type, out.shape
    graph.replace_uses(out, result)
    graph.remove_dead([node])
    return True
