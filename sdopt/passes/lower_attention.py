"""``lower_attention``: Attention as MatMul, Softmax and MatMul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt.passes._attention import attentions, read
from sdopt.passes._attention_decomposed import write_decomposed
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write Attention out, for compilers that have no operator for it.

    Before / After:
        Attention(q, k, v, mask)
            ->  MatMul(Softmax(MatMul(q * scale, k^T) + mask), v)

    Applies when: the heads and head sizes are known, and there is no cache and no softcap. Masks,
    causality and heads that share keys and values are written out too. The operators used mean
    the same in opset 11 to 23. After ``flash_attention`` it takes the attentions that the target's
    kernel cannot.

    Numerics: reassociated.

    Options: none.

    Counts: ``attention``.

    Example:
        sdopt optimize BUNDLE --passes @fast,lower_attention
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "fuse_qkv",
        "cast_fp16",
        "cast_bf16",
        "tome",
        "flash_attention",
    )

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Lower every Attention of the main graph that is fully known."""
        shapes = Shapes(model.graph)
        for node in attentions(model):
            call = read(node, shapes)
            if isinstance(call, str):
                ctx.skip(call, node, kind="attention")
                continue
            write_decomposed(call, "lower_attention", shapes, ctx)
            ctx.count("attention")
