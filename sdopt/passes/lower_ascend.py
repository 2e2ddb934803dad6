"""``lower_ascend``: inputs, slices and quantized layers as Ascend's compiler wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _ascend_quantized
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import Interface, Numerics, Pass, PassContext


@dataclass(frozen=True)
class LowerAscend(Pass):
    """Write what ATC takes only in its own way.

    Before / After:
        timestep: float, no axis       ->  int32 [1] and a Cast
        Slice(x, 0, n); Slice(x, n)    ->  Split(x)
        MatMul(DQ(Q(x)), DQ(W))        ->  AscendDequant(MatMul(AscendQuant(x), W))

    Applies when: the timestep is an input of one float. Two Slices cut one value into two whole
    parts along one axis of known size. ``quantize=int8`` put the pairs in front of a Conv, MatMul
    or Gemm, symmetric, one scale per activation and one per output channel of the weight: ATC has
    no QuantizeLinear. AscendDequant's scale is the product of both, as bits of a float32 in a
    uint64; the bias is added behind it in float. Quantized weights alone, zero points and other
    places of QuantizeLinear are left, and the target refuses them by name.

    Numerics: reassociated: a quantized layer sums whole numbers. A timestep between two whole
    numbers is cut off by whoever feeds it.

    Options:
        timestep: int32 (the default, as ``modify_onnx.py`` of Ascend's ModelZoo has it) or keep.

    Counts: ``timestep``, ``slice_pair`` and ``quantized``.

    Example:
        sdopt optimize BUNDLE --passes @fast,lower_ascend,lower_opset=17
    """

    timestep: Literal["int32", "keep"] = "int32"

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    interface: ClassVar[Interface] = Interface.CHANGES
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "cast_fp16",
        "tome",
        "quantize",
        "quick_gelu",
        "flash_attention",
    )
    vendor_ops: ClassVar[frozenset[str]] = _ascend_quantized.OPERATORS

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Rewrite the input, the slices and the quantized layers."""
        if self.timestep == "int32":
            _whole_timestep(model, ctx)
        shapes = Shapes(model.graph)
        for node in list(model.graph):
            if node.op_type == "Slice" and node.graph is not None and not node.domain:
                _split(node, shapes, ctx)
        _ascend_quantized.lower(model, shapes, ctx)


def _whole_timestep(model: ir.Model, ctx: PassContext) -> None:
    """The input of one float called a timestep becomes ``int32 [1]``."""
    for value in model.graph.inputs:
        if value.name not in ("timestep", "t", "timesteps") or value.shape is None:
            continue
        size = [dim for dim in value.shape if dim != 1]
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64) or size:
            continue
        readers, dtype, rank = list(value.uses()), value.dtype, len(value.shape)
        value.type, value.shape = ir.TensorType(ir.DataType.INT32), ir.Shape([1])
        ctx.count("timestep")
        if not readers:
            continue
        emit = ctx.emitter(_first(model, [node for node, _ in readers]), "timestep/lower_ascend")
        cast = emit("Cast", value, to=int(dtype))
        cast.type, cast.shape = ir.TensorType(dtype), ir.Shape([1])
        if rank != 1:
            cast = emit("Reshape", cast, emit.const(np.ones(rank, np.int64)))
            cast.type, cast.shape = ir.TensorType(dtype), ir.Shape([1] * rank)
        for node, index in readers:
            node.replace_input_with(index, cast)


def _first(model: ir.Model, nodes: list[ir.Node]) -> ir.Node:
    order = {node: index for index, node in enumerate(model.graph)}
    return min(nodes, key=lambda node: order.get(node, len(order)))


def _split(node: ir.Node, shapes: Shapes, ctx: PassContext) -> None:
    """Two Slices of one value, one behind the other, become a Split of it."""
    source = node.inputs[0]
    span = _span(node, shapes)
    if source is None or span is None:
        return
    axis, start, middle, size = span
    if start != 0 or not 0 < middle < size:
        return
    for other in source.consumers():
        if other is node or other.op_type != "Slice" or other.graph is not node.graph:
            continue
        if _span(other, shapes) != (axis, middle, size, size):
            continue
        order = _first(ctx.model, [node, other])
        emit = ctx.emitter(order, f"{graph.module_path(node)}/lower_ascend")
        parts = emit.many(
            "Split", source, emit.const([middle, size - middle]), outputs=2, axis=axis
        )
        for old, new in zip((node, other), parts, strict=True):
            shapes.stands_for(new, old.outputs[0])
            graph.replace_uses(old.outputs[0], new)
        graph.remove_dead([node, other])
        ctx.count("slice_pair")
        return


def _span(node: ir.Node, shapes: Shapes) -> tuple[int, int, int, int] | None:
    """Axis, start and end of a Slice along one axis in steps of 1, and the size of that axis."""
    dims = shapes.dims(node.inputs[0])
    given = [graph.constant(value) for value in node.inputs[1:]]
    if dims is None or len(given) < 3 or any(one is None or one.size != 1 for one in given):
        return None
    start, end, axis, *step = (int(one.reshape(-1)[0]) for one in given if one is not None)
    size = dims[axis].known
    if size is None or step not in ([], [1]):
        return None
    return axis % len(dims), *slice(start, end).indices(size)[:2], size
