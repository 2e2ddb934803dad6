"""``fuse_shared_linears``: the many small projections of one input as a few wide ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._linear import match
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class _Projection:
    """``out = x @ W.T (+ bias)`` with W of ``[out_features, in_features]``."""

    node: ir.Node
    out: ir.Value
    weight: ir.TensorProtocol
    bias: ir.TensorProtocol | None
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class FuseSharedLinears(Pass):
    """Compute projections of one input that are equally wide as one product, and split it.

    Before / After:
        k, v of every cross-attention: MatMul(context, Transpose(Wi))
            ->  Split(MatMul(context, Transpose([W0; W1; ...])))
        the time embedding's part in every block: Gemm(t, Wi, bi)
            ->  Split(Gemm(t, [W0; W1; ...], [b0; b1; ...]))

    Applies when: at least ``least`` of them read one value, in the layout of a checkpoint, with as
    many outputs each (a Split into equal parts is one launch in onnxruntime), all with a bias or
    none. The wide weight is concatenated while it is written. It pays where rows are few: an SD1.5
    step has 32 such products of 77 tokens and 22 of one row, which a card begins and ends faster
    than it fills.

    Numerics: reassociated (a wider product may sum in another order).

    Options:
        least: how many there must be; 4 by default, which leaves q, k and v as they are.

    Counts: ``shared_linear``, the projections that became part of another.
    """

    least: int = 4

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "lora",
        "clean",
        "raise_ops",
        "fuse_qkv",
        "cast_fp16",
        "cast_bf16",
        "hoist",
        "flash_attention",
    )

    def __post_init__(self) -> None:
        if self.least < 2:
            raise ValueError(f"least must be 2 or more, not {self.least}")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Fuse within the main graph, value by value."""
        order = {node: index for index, node in enumerate(model.graph)}
        groups: dict[Hashable, list[_Projection]] = {}
        for node in model.graph:
            if (found := _projection(node)) is not None:
                one, key = found
                groups.setdefault(key, []).append(one)
        for group in groups.values():
            if len(group) >= self.least:
                _fuse(group, order, ctx)
                ctx.count("shared_linear", len(group))


def _projection(node: ir.Node) -> tuple[_Projection, Hashable] | None:
    """The projection that a node computes, and what must be equal for two to be one."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    made = _of_gemm(node) if node.op_type == "Gemm" else _of_matmul(node)
    if made is None or made.out.is_graph_output():
        return None
    width = int(made.weight.shape.numpy()[0])
    biased = made.bias is not None
    return made, (node.op_type, node.inputs[0], made.weight.dtype, width, biased)


def _of_gemm(node: ir.Node) -> _Projection | None:
    plain = all(graph.attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or graph.attribute(node, "transA", 0) or not graph.attribute(node, "transB", 0):
        return None
    weight, bias = (
        _parameter(node.inputs[index] if len(node.inputs) > index else None) for index in (1, 2)
    )
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    if weight is None or (given and (bias is None or len(bias.shape) != 1)):
        return None
    return _Projection(node, node.outputs[0], weight, bias, (node,))


def _of_matmul(node: ir.Node) -> _Projection | None:
    add = graph.single_consumer(node.outputs[0])
    linear = match(add.outputs[0]) if add is not None and add.op_type == "Add" else None
    if linear is None or linear.matmul is not node:
        linear = match(node.outputs[0])
    if linear is None or not linear.transposed:
        return None
    return _Projection(node, linear.out, linear.weight, linear.bias, linear.nodes)


def _parameter(value: ir.Value | None) -> ir.TensorProtocol | None:
    fixed = value is not None and value.is_initializer() and not value.is_graph_input()
    return value.const_value if value is not None and fixed else None


def _fuse(group: Sequence[_Projection], order: dict[ir.Node, int], ctx: PassContext) -> None:
    anchor = min((one.node for one in group), key=order.__getitem__)
    emit = ctx.emitter(anchor, f"{graph.module_path(anchor)}/fuse_shared_linears")
    weight = emit.weight(weights.concat([one.weight for one in group], 0), "weight")
    biases = [one.bias for one in group if one.bias is not None]
    bias = emit.weight(weights.concat(biases), "bias") if biases else None
    x = anchor.inputs[0]
    if anchor.op_type == "Gemm":
        wide = emit("Gemm", x, weight, *([bias] if bias is not None else []), transB=1)
    else:
        wide = emit("MatMul", x, emit("Transpose", weight, perm=[1, 0]))
        wide = emit("Add", wide, bias) if bias is not None else wide
    wide.dtype = group[0].weight.dtype
    sizes = emit.const([int(group[0].weight.shape.numpy()[0])] * len(group))
    parts = emit.many("Split", wide, sizes, outputs=len(group), axis=-1)
    for one, part in zip(group, parts, strict=True):
        part.type, part.shape = one.out.type, one.out.shape
        graph.replace_uses(one.out, part)
    graph.remove_dead([node for one in group for node in one.nodes])
