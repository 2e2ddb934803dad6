"""Several Linear layers of one input as one: when that can be, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._linear import Linear
from sdopt.passes.base import PassContext


def mismatch(linears: Sequence[Linear]) -> str | None:
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


def fuse(
    linears: Sequence[Linear], word: str, order: dict[ir.Node, int], ctx: PassContext
) -> None:
    """One MatMul and a Split in their place; ``word`` (``qkv``) goes into the weight's name."""
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
