"""``lower_attention``: Attention as the fused kernel that ONNX Runtime's CPU is fastest with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _heads
from sdopt.passes.base import Numerics, Pass, PassContext

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write Attention as com.microsoft's MultiHeadAttention, without the transposes around it.

    Before / After:
        Attention(T(Reshape(q)), T(Reshape(k)), T(Reshape(v))) -> T -> Reshape
            ->  MultiHeadAttention(q, k, v)

    Applies when: the heads and head sizes are known, and there is no mask, cache, causality,
    softcap or group of heads. Where the operands are not transposed from ``[B, S, heads * D]``,
    the transposes are written.

    Numerics: reassociated (the kernel sums softmax block by block).

    Options: none.

    Counts: ``attention``; a MultiHeadAttention that was there before is done already.

    Why this form: onnxruntime 1.31's Attention kernel makes the whole ``[B, heads, S, S]`` matrix,
    the one of MultiHeadAttention goes over it in blocks that stay in the cache. Measured by
    ``benchmarks/lowering.py``, batch 2, CPU time over Attention's (lower is better):

        heads x D, Sq x Sk    this    MatMul, Softmax, MatMul    Attention of 3-D operands
        8 x 8, 1024 x 1024    0.72    1.07                       0.98
        8 x 40, 1024 x 1024   0.81    1.04                       0.98
        8 x 40, 4096 x 4096   0.75    1.01                       0.96
        8 x 40, 4096 x 77     0.80    0.90                       0.83
        4 x 8, 256 x 256      0.97    0.95                       0.81
        1 x 512, 1024 x 1024  1.01    1.06                       0.90

    A whole step of examples/digits, both lowerings over the raw graph: 0.77 at a latent of 16x16
    in a batch of 2, 0.74 of 16, 0.82 at 32x32; with 3-D Attention 0.75, 0.86 and 0.88.

    Example:
        sdopt build BUNDLE --target ort
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "fuse_qkv",
        "cast_fp16",
        "cast_bf16",
        "tome",
    )

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Lower every Attention of the main graph that the kernel can take."""
        for node in list(model.graph):
            if node.op_type == "MultiHeadAttention" and node.domain == MICROSOFT:
                ctx.already("attention")
            if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
                continue
            sizes = _sizes(node)
            if isinstance(sizes, str):
                ctx.skip(sizes, node, "attention")
                continue
            model.opset_imports[MICROSOFT] = 1
            _lower(node, *sizes, ctx)
            ctx.count("attention")


def _sizes(node: ir.Node) -> tuple[int, int, int] | str:
    """Heads, head size of q and k, head size of v; or why the kernel cannot take this node."""
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) > 1:
        return "it has a mask or a cache, which MultiHeadAttention's fast path does not take"
    for name in ("is_causal", "softcap", "qk_matmul_output_mode", "q_num_heads"):
        if graph.attribute(node, name, 0):
            return f"it sets {name}"
    q, k, v = node.inputs[:3]
    if not all(_heads.rank(value) == 4 for value in (q, k, v)):
        return "its operands are not known to be [B, heads, S, D]"
    heads, size, v_size = _heads.static(q, 1), _heads.static(q, 3), _heads.static(v, 3)
    if heads is None or size is None or v_size is None:
        return "its heads or head sizes are not known"
    if heads != _heads.static(k, 1) or heads != _heads.static(v, 1):
        return "heads share keys and values (grouped query attention)"
    return heads, size, v_size


def _lower(node: ir.Node, heads: int, size: int, v_size: int, ctx: PassContext) -> None:
    emit = ctx.emitter(node, f"{graph.module_path(node)}/lower_attention")
    sources = list(node.inputs[:3])
    widths = (heads * size, heads * size, heads * v_size)
    flat = [
        _heads.before_split(value, width)
        or emit(
            "Reshape", emit("Transpose", value, perm=list(_heads.SWAP)), emit.const([0, 0, width])
        )
        for value, width in zip(sources, widths, strict=True)
    ]
    scale = graph.attribute(node, "scale", None)
    extra = {} if scale is None else {"scale": float(scale)}
    fused = emit("MultiHeadAttention", *flat, domain=MICROSOFT, num_heads=heads, **extra)
    out = node.outputs[0]
    fused.type = out.type
    reads = _heads.joins(out, widths[2])
    if reads:
        fused.shape = reads[0].outputs[0].shape
    for join in reads:
        graph.replace_uses(join.outputs[0], fused)
    if out.is_graph_output() or not all(map(_heads.is_dead_end, out.consumers())):
        split = emit("Reshape", fused, emit.const([0, 0, heads, v_size]))
        split = emit("Transpose", split, perm=list(_heads.SWAP))
        split.type, split.shape = out.type, out.shape
        graph.replace_uses(out, split)
    graph.remove_dead([*reads, node])
