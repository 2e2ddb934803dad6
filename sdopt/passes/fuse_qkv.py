"""``fuse_qkv``: one projection for q, k and v, or one for the k and v of a cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._linear import Linear, behind
from sdopt.passes.base import Numerics, Pass, PassContext

SELF, CROSS = "self_attention_qkv", "cross_attention_kv"
OTHER = "other_projections"
"""Of an attention whose projections cannot be followed, so that nobody knows which it is."""


@dataclass(frozen=True)
class FuseQkv(Pass):
    """Fuse the projections of each attention that read the same input.

    Before / After:
        MatMul(x, Transpose(Wq)), ...(Wk), ...(Wv)  ->  Split(MatMul(x, Transpose([Wq; Wk; Wv])))
        k and v of a cross-attention                ->  Split(MatMul(c, Transpose([Wk; Wv])))

    Applies when: the projections are MatMul (with or without a bias Add) of one input with a
    weight initializer, in either layout. The fused weight is concatenated from the initializers
    while it is written, so whatever was merged into them is in it.

    Numerics: reassociated (a wider MatMul may sum in another order).

    Options: none.

    Counts: ``self_attention_qkv`` and ``cross_attention_kv``, one per attention;
    ``other_projections`` where q, k and v cannot be followed to their projections.

    Example:
        sdopt optimize BUNDLE --passes clean,fuse_qkv --require self_attention_qkv=all
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = ("lora", "clean", "raise_ops")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Fuse behind every Attention node of the main graph."""
        order = {node: index for index, node in enumerate(model.graph)}
        for node in list(model.graph):
            if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
                _fuse_attention(node, order, ctx)


def _fuse_attention(node: ir.Node, order: dict[ir.Node, int], ctx: PassContext) -> None:
    found = [behind(value) for value in node.inputs[:3]]
    fused = [_fused(one) for one in found]
    if fused[1] is not None and fused[1] is fused[2]:
        ctx.already(SELF if fused[0] is fused[1] else CROSS)
        return
    linears = [one for one in found if isinstance(one, Linear)]
    if len(linears) < 3:
        which = [
            name for name, one in zip("qkv", found, strict=False) if not isinstance(one, Linear)
        ]
        names = " and ".join(which)
        ctx.skip(f"{names} come from no linear projection of a weight", node, OTHER)
        return
    q, k, v = linears
    if k.x is not v.x:
        ctx.skip(f"{k.label} reads another input than {v.label}", node, OTHER)
        return
    kind = SELF if q.x is k.x else CROSS
    if kind == SELF and (reason := _mismatch(linears)) is None:
        _fuse(linears, "qkv", order, ctx)
        ctx.count(SELF)
    elif (reason := _mismatch([k, v])) is None:
        if kind == CROSS:
            ctx.count(CROSS)
        else:
            ctx.count("k, v of a self-attention")
            ctx.skip(f"only k and v fused: {_mismatch(linears)}", node, SELF)
        _fuse([k, v], "kv", order, ctx)
    else:
        ctx.skip(reason, node, kind)


def _fused(one: Linear | ir.Value | None) -> ir.Node | None:
    """The Split that hands out a projection shared by several operands, or None."""
    split = graph.producer(one, "Split") if isinstance(one, ir.Value) else None
    return split if split is not None and isinstance(behind(split.inputs[0]), Linear) else None


def _mismatch(linears: Sequence[Linear]) -> str | None:
    """Why these projections of one input cannot be one MatMul, or None."""
    first = linears[0]
    if len({linear.matmul for linear in linears}) < len(linears):
        return "two of the projections are one and the same node"
    for other in linears[1:]:
        if other.transposed != first.transposed:
            return f"{other.label} stores its weight in another layout than {first.label}"
        if other.weight.dtype != first.weight.dtype:
            return f"{other.label} has another dtype than {first.label}"
    return None


def _fuse(
    linears: Sequence[Linear], word: str, order: dict[ir.Node, int], ctx: PassContext
) -> None:
    anchor = min((linear.matmul for linear in linears), key=order.__getitem__)
    first = linears[0]
    base = _fused_name([linear.weight_value.name or "" for linear in linears], word)
    emit = ctx.emitter(anchor, base)
    emit.module = base
    tensors = [linear.weight for linear in linears]
    axis = 0 if first.transposed else 1
    weight = emit.weight(weights.concat(tensors, axis), "weight")
    if first.transposed:
        weight = emit("Transpose", weight, perm=[1, 0])
    fused = emit("MatMul", first.x, weight)
    sizes = [linear.out_features for linear in linears]
    if any(linear.bias is not None for linear in linears):
        biases = [
            linear.bias or weights.full([size], 0.0, first.weight.dtype)
            for linear, size in zip(linears, sizes, strict=True)
        ]
        fused = emit("Add", fused, emit.weight(weights.concat(biases), "bias"))
    fused.dtype = first.weight.dtype
    parts = emit.many("Split", fused, emit.const(sizes), outputs=len(sizes), axis=-1)
    for linear, part in zip(linears, parts, strict=True):
        part.type, part.shape = linear.out.type, linear.out.shape
        graph.replace_uses(linear.out, part)
    graph.remove_dead([node for linear in linears for node in linear.nodes])


def _fused_name(names: Sequence[str], word: str) -> str:
    """``a.to_q.weight``, ``a.to_k.weight``, ... to ``a.to_qkv``; ``q_proj`` to ``qkv_proj``."""
    parts = [name.split(".") for name in names]
    last = parts[-1]
    depth = next(
        (i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0
    )
    stem = last[depth]
    renamed = f"{word}_proj" if stem.endswith("_proj") else f"to_{word}"
    return ".".join([*last[:depth], renamed])
