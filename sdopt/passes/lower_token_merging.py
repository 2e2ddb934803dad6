"""``lower_token_merging``: token merging in the operators that CUDA has fast kernels for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import Numerics, Pass, PassContext

END = 2**62
"""A Slice that ends there goes to the end."""


@dataclass(frozen=True)
class LowerTokenMerging(Pass):
    """Write the best match as ArgMax, and the sums of merged tokens as ScatterElements.

    Before / After:
        best, i = TopK(x, 1)                       ->  i = ArgMax(x); best = GatherElements(x, i)
        hits = Cast(Equal(place, k + Range(n)))
        MatMul(hits, tokens), ReduceSum(hits)      ->  ScatterElements(0, place, tokens, add)[k:]

    Applies when: a TopK asks for the one largest value of the last axis, whoever wrote it; and a
    one-hot matrix of whole numbers against a range is what multiplies tokens, as ``tome`` writes
    it. onnxruntime 1.31's TopK reads a row many times over, and a product with a one-hot matrix
    reads as many zeros (``benchmarks/operators.py`` times both). TensorRT-RTX refuses a
    ScatterElements that adds, hence not in ``tome`` itself.

    Numerics: reassociated: a sum's order is that in which the card's threads come.

    Options: none.

    Counts: ``best_match`` and ``token_sum``.
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = ("tome", "cast_fp16", "cast_bf16")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Rewrite every place in the main graph."""
        if graph.opset(model) < 18:
            ctx.note("ScatterElements adds from opset 18 on: the graph is unchanged")
            return
        for node in list(model.graph):
            if node.op_type == "TopK" and _asks_for_one(node):
                _best(node, ctx)
                ctx.count("best_match")
            elif node.op_type in ("MatMul", "ReduceSum") and (found := _one_hot(node)):
                _sum(node, found, ctx)
                ctx.count("token_sum")


@dataclass(frozen=True)
class _OneHot:
    """``hits[b, d, s]`` is whether ``place[b, s]`` is ``first + d``, for ``d`` below ``count``."""

    place: ir.Value
    first: ir.Value
    count: ir.Value


def _asks_for_one(node: ir.Node) -> bool:
    rank, axis = graph.rank(node.inputs[0]), graph.attribute(node, "axis", -1)
    last = axis == -1 or (rank is not None and axis == rank - 1)
    count = graph.constant(node.inputs[1])
    largest = graph.attribute(node, "largest", 1) == 1
    return last and largest and count is not None and count.tolist() == [1]


def _best(node: ir.Node, ctx: PassContext) -> None:
    """TopK of one: its ties take the first, as ArgMax's do."""
    emit = ctx.emitter(node, f"{graph.module_path(node)}/lower_token_merging")
    source, (best, index) = node.inputs[0], node.outputs
    at = emit("ArgMax", source, axis=-1, keepdims=1)
    value = emit("GatherElements", source, at, axis=-1)
    for old, new in ((best, value), (index, at)):
        new.type, new.shape = old.type, old.shape
        graph.replace_uses(old, new)
    graph.remove_dead([node])


def _one_hot(node: ir.Node) -> _OneHot | None:
    """The one-hot matrix that a product or a sum over the last axis reads."""
    if node.op_type == "ReduceSum":
        axes = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        kept = graph.attribute(node, "keepdims", 1) == 1
        if axes is None or axes.tolist() != [-1] or not kept:
            return None
    cast = graph.producer(node.inputs[0], "Cast")
    equal = graph.producer(cast.inputs[0], "Equal") if cast is not None else None
    if equal is None:
        return None
    row, column = (graph.producer(value, "Unsqueeze") for value in equal.inputs)
    if row is None or column is None:
        return None
    if _axes(row) != [1] or _axes(column) != [1] or graph.rank(column.inputs[0]) not in (1, None):
        return None
    add = graph.producer(column.inputs[0], "Add")
    steps = graph.producer(add.inputs[0], "Range") if add is not None else None
    if add is None or steps is None or row.inputs[0] is None:
        return None
    begin, count, step = steps.inputs
    first = add.inputs[1]
    if graph.scalar(begin) != 0 or graph.scalar(step) != 1 or count is None or first is None:
        return None
    return _OneHot(row.inputs[0], first, count)


def _axes(node: ir.Node) -> list[int] | None:
    found = graph.constant(node.inputs[1])
    return None if found is None else found.tolist()


def _sum(node: ir.Node, hits: _OneHot, ctx: PassContext) -> None:
    """Sum what has the same place: tokens ``[B, S, C]`` of a MatMul, or ones of a ReduceSum.

    Places below the first one of the range have rows of their own, which are then cut off.
    """
    emit = ctx.emitter(node, f"{graph.module_path(node)}/lower_token_merging")
    out, minus = node.outputs[0], emit.const([-1])
    dtype = out.dtype or ir.DataType.FLOAT
    place = emit("Unsqueeze", hits.place, minus)
    batch = emit("Shape", hits.place, start=0, end=1)
    rows = emit("Unsqueeze", emit("Add", hits.first, hits.count), emit.const([0]))
    if node.op_type == "MatMul":
        tokens = node.inputs[1]
        assert tokens is not None
        width = emit("Shape", tokens, start=2, end=3)
        place = emit("Expand", place, emit("Shape", tokens))
    else:
        width = emit.const([1])
        one = emit.const([1.0], dtype.numpy())
        tokens = emit("Expand", one, emit("Shape", place))
    shape = emit("Concat", batch, rows, width, axis=0)
    zeros = emit("Expand", emit.const([0.0], dtype.numpy()), shape)
    summed = emit("ScatterElements", zeros, place, tokens, axis=1, reduction="add")
    first = emit("Unsqueeze", hits.first, emit.const([0]))
    made = emit("Slice", summed, first, emit.const([END]), emit.const([1]))
    made.type, made.shape = out.type, out.shape
    graph.replace_uses(out, made)
    graph.remove_dead([node])
