"""``fuse_qkv``: one projection for q, k and v, or one for the k and v of a cross-attention."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._fused_linear import fuse, mismatch
from sdopt.passes._linear import Linear, behind, joined
from sdopt.passes.base import Numerics, Pass, PassContext

SELF, CROSS, JOINT = "self_attention_qkv", "cross_attention_kv", "joint_attention_qkv"
OTHER = "other_projections"
"""Of an attention whose projections cannot be followed, so that nobody knows which it is."""


@dataclass(frozen=True)
class FuseQkv(Pass):
    """Fuse the projections of each attention that read the same input.

    Before / After:
        MatMul(x, Transpose(Wq)), ...(Wk), ...(Wv)  ->  Split(MatMul(x, Transpose([Wq; Wk; Wv])))
        k and v of a cross-attention                ->  Split(MatMul(c, Transpose([Wk; Wv])))
        a joint attention over image and prompt     ->  one MatMul for each of the two

    Applies when: the projections are MatMul (with or without a bias Add) of one input with a
    weight initializer, in either layout; norms over a head may follow. The fused weight is
    concatenated from the initializers while it is written, so whatever was merged into them is
    in it.

    Numerics: reassociated (a wider MatMul may sum in another order).

    Options: none.

    Counts: ``self_attention_qkv``, ``cross_attention_kv`` and ``joint_attention_qkv``, one per
    attention; ``other_projections`` where q, k and v cannot be followed to their projections.

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
    operands = [joined(value) for value in node.inputs[:3]]
    if len({len(parts) for parts in operands}) > 1:
        ctx.skip("q, k and v are concatenated from different numbers of parts", node, OTHER)
        return
    streams = list(zip(*operands, strict=True))
    kind = None if len(streams) == 1 else JOINT
    done = [_fuse_stream(found, node, kind, order, ctx) for found in streams]
    if kind is not None and all(done):
        ctx.already(kind) if Done.ALREADY in done else ctx.count(kind)


class Done(enum.Enum):
    """How the projections of one stream came to be fused."""

    NOW = enum.auto()
    ALREADY = enum.auto()


def _fuse_stream(
    found: Sequence[Linear | ir.Value | None],
    node: ir.Node,
    joint: str | None,
    order: dict[ir.Node, int],
    ctx: PassContext,
) -> Done | None:
    """Fuse the projections of one input of an attention; None where they stay.

    An attention of one stream is counted here; one of several (``joint``) by its caller.
    """
    fused = [_fused(one) for one in found]
    if fused[1] is not None and fused[1] is fused[2]:
        if joint is None:
            ctx.already(SELF if fused[0] is fused[1] else CROSS)
        return Done.ALREADY
    linears = [one for one in found if isinstance(one, Linear)]
    if len(linears) < 3:
        which = [
            name for name, one in zip("qkv", found, strict=False) if not isinstance(one, Linear)
        ]
        names = " and ".join(which)
        ctx.skip(f"{names} come from no linear projection of a weight", node, joint or OTHER)
        return None
    q, k, v = linears
    if k.x is not v.x:
        ctx.skip(f"{k.label} reads another input than {v.label}", node, joint or OTHER)
        return None
    kind = SELF if q.x is k.x else CROSS
    if kind == SELF and (reason := mismatch(linears)) is None:
        fuse(linears, "qkv", order, ctx)
    elif (reason := mismatch([k, v])) is None:
        if kind == SELF:
            ctx.count("k, v of a self-attention")
            ctx.skip(f"only k and v fused: {mismatch(linears)}", node, joint or SELF)
        fuse([k, v], "kv", order, ctx)
        if kind == SELF:
            return None
    else:
        ctx.skip(reason, node, joint or kind)
        return None
    if joint is None:
        ctx.count(kind)
    return Done.NOW


def _fused(one: Linear | ir.Value | None) -> ir.Node | None:
    """The Split that hands out a projection shared by several operands, or None."""
    split = graph.producer(one, "Split") if isinstance(one, ir.Value) else None
    return split if split is not None and isinstance(behind(split.inputs[0]), Linear) else None
