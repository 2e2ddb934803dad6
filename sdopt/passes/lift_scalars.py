"""``lift_scalars``: a graph whose scalar inputs may come as tensors of one element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class LiftScalars(Pass):
    """Read scalar inputs through a Reshape, for compilers that know only tensors with axes.

    Before / After:
        Unsqueeze(timestep, [0])  ->  Reshape(timestep, [1])
        Mul(timestep, x)          ->  Mul(Reshape(timestep, []), x)

    Applies when: an input of the graph has no axis. The graph computes the same whether that
    input is declared ``[]`` or ``[1]``. Sophgo's frontend (tpu_mlir 1.30.2) declares it ``[1]``
    without looking at who reads it; the Unsqueeze of a timestep then makes ``[1, 1]`` of it, and
    nothing behind it can be computed beforehand.

    Numerics: exact.

    Options: none.

    Counts: ``scalar_input``.

    Example:
        sdopt build BUNDLE --target tpu --emit-only
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("clean", "raise_ops", "hoist", "deep_cache", "lower_opset")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Give each scalar input a Reshape, and fold an Unsqueeze that follows into it."""
        for value in model.graph.inputs:
            if graph.rank(value) != 0 or not (users := list(value.consumers())):
                continue
            if all(node.op_type == "Reshape" for node in users):
                ctx.already("scalar_input")
                continue
            for node in users:
                if node.op_type == "Unsqueeze" and _adds_one_axis(node):
                    _reshape(value, node, ctx)
            if rest := [node for node in value.consumers() if node.op_type != "Reshape"]:
                _read_as_scalar(value, rest, ctx)
            ctx.count("scalar_input")


def _adds_one_axis(node: ir.Node) -> bool:
    """Whether an Unsqueeze of a scalar makes ``[1]``; axes are an attribute before opset 13."""
    axes = graph.attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = graph.constant(node.inputs[1])
    return axes is not None and len(axes) == 1


def _reshape(value: ir.Value, node: ir.Node, ctx: PassContext) -> None:
    emit = ctx.emitter(node, "lift_scalars")
    old = node.outputs[0]
    new = emit("Reshape", value, emit.const([1]))
    new.type, new.shape = value.type, ir.Shape([1])
    graph.replace_uses(old, new)
    graph.remove_dead([node])


def _read_as_scalar(value: ir.Value, users: list[ir.Node], ctx: PassContext) -> None:
    """One Reshape to no axis, in front of the first of the nodes that want a scalar."""
    first = next(node for node in ctx.model.graph if node in users)
    emit = ctx.emitter(first, "lift_scalars")
    scalar = emit("Reshape", value, emit.const([]))
    scalar.type, scalar.shape = value.type, ir.Shape([])
    for node in users:
        for index, read in enumerate(node.inputs):
            if read is value:
                node.replace_input_with(index, scalar)
