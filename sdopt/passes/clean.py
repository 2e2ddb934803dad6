"""``clean``: remove what computes nothing, and compute now what is known now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from sdopt import graph, weights
from sdopt.passes import _folding, _noops, _shape_chains
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class Clean(Pass):
    """Remove no-ops, dead code and duplicates; fold shape arithmetic and constants.

    Before / After:
        Constant, Shape, Squeeze, Reshape, Concat ...   ->  the numbers, or the one Shape needed
        Reshape(x, Concat(Shape(x)[0], ..., heads))     ->  Reshape(x, [0, -1, heads])
        SplitToSequence -> SequenceAt                   ->  Split
        Identity, x * 1, Cast to the same type          ->  x
        two equal computations, two equal weights       ->  one

    Applies when: always. A Linear's Transpose(W) is never folded, since that would rewrite every
    weight; what needs exp, sin or pow is never folded, since runtimes disagree on the last bit.
    A shape is written down where no size is 0: a Reshape cannot tell -1 of nothing.

    Numerics: exact.

    Options: none.
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Run the rules over every graph until none applies."""
        while True:
            before = sum(ctx.rewrites.values())
            for one in list(model.graphs()):
                _sweep(one, graph.opset(model), ctx)
            _share_weights(model, ctx)
            _merge_equal_nodes(model, ctx)
            _remove_unused(model, ctx)
            if sum(ctx.rewrites.values()) == before:
                _shape_chains.write_down(model.graph, ctx)
            if sum(ctx.rewrites.values()) == before:
                return


def _sweep(one: ir.Graph, opset: int, ctx: PassContext) -> None:
    """Fold or bypass each node, producers first, so that one sweep carries chains along."""
    for node in list(one):
        if node.graph is None:
            continue
        if (arrays := _folding.fold(node, opset)) is not None:
            _replace_by_constants(one, node, arrays, ctx)
        elif (same := _noops.bypass(node)) is not None:
            graph.replace_uses(node.outputs[0], same)
            graph.remove_dead([node])
            ctx.count("no-op removed")
        elif _noops.sequence_to_split(node, ctx):
            ctx.count("SplitToSequence+SequenceAt to Split")


def _replace_by_constants(
    one: ir.Graph, node: ir.Node, arrays: list[np.ndarray], ctx: PassContext
) -> None:
    if any(out.is_graph_output() for out in node.outputs):
        return
    for output, array in zip(node.outputs, arrays, strict=True):
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape))
        given = (v.const_value for v in node.inputs if v is not None)
        read = tuple(one for one in given if one is not None)
        weights.made_by(tensor, weights.Recipe("fold", read, (("op", node.op_type),)))
        value = graph.add_initializer(one, tensor, ctx.unique(output.name or "folded"))
        output.replace_all_uses_with(value)
    graph.remove_dead([node])
    ctx.count("constant to initializer" if node.op_type == "Constant" else "node folded")


def _share_weights(model: ir.Model, ctx: PassContext) -> None:
    """Let equal initializers be one: by place in the file, or by bytes when they are small."""
    first: dict[object, ir.Value] = {}
    for name in sorted(model.graph.initializers):
        value = model.graph.initializers[name]
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            continue
        key: tuple[object, ...] = (tensor.dtype, tuple(tensor.shape))
        if isinstance(tensor, ir.ExternalTensor):
            key += (tensor.path, tensor.offset)
        elif isinstance(tensor, ir.LazyTensor) or not _is_plain_constant(tensor):
            continue
        else:
            key += (tensor.tobytes(),)
        if (kept := first.setdefault(key, value)) is not value:
            value.replace_all_uses_with(kept)
            ctx.count(
                "shared weight" if isinstance(tensor, ir.ExternalTensor) else "shared constant"
            )


def _is_plain_constant(tensor: ir.TensorProtocol) -> bool:
    """A shape, an axis, a scale: not a parameter that a user knows by its name."""
    if tensor.dtype.is_floating_point():
        return tensor.size == 1
    return tensor.size <= graph.SMALL_ELEMENTS and tensor.dtype != ir.DataType.STRING


def _merge_equal_nodes(model: ir.Model, ctx: PassContext) -> None:
    before = sum(1 for _ in model.graph)
    CommonSubexpressionEliminationPass()(model)
    if removed := before - sum(1 for _ in model.graph):
        ctx.count("equal nodes merged", removed)


def _remove_unused(model: ir.Model, ctx: PassContext) -> None:
    removed = graph.remove_dead(reversed(list(model.graph)))
    if removed:
        ctx.count("dead node removed", removed)
    graph.drop_unused_initializers(model)
