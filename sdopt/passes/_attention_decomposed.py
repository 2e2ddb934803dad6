"""Attention as MatMul, Softmax and MatMul, in operators that opset 11 to 23 spell alike."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._attention import HALVES, Attention
from sdopt.passes._heads import Heads, Layout
from sdopt.passes._raise_dims import Dim
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

_TRANSPOSED_LAST = (0, 2, 3, 1)
_TRANSPOSED_FIRST = (0, 1, 3, 2)


def write_decomposed(call: Attention, label: str, shapes: Shapes, ctx: PassContext) -> None:
    """Replace an Attention by ``MatMul(Softmax(MatMul(q * scale, k^T) + mask), v)``.

    The scale is multiplied into q: compilers that fuse the three look for it before the first
    MatMul, and in half precision the scores stay small.
    """
    emit = ctx.emitter(call.node, f"{graph.module_path(call.node)}/{label}")
    q = scaled(call.q.to(Layout.FIRST, emit, shapes), call.scale, call.dtype, emit)
    scores = emit("MatMul", q, _transposed(call, emit, shapes))
    if call.mask is not None:
        scores = emit("Add", scores, added(call, emit))
    later = _later(call, scores, emit) if call.causal else None
    if later is not None:
        scores = emit("Where", later, _lowest(call, emit), scores)
    wide = call.softmax_type if call.dtype in HALVES else call.dtype
    if wide != call.dtype:
        scores = emit("Cast", scores, to=int(wide))
    shares = emit("Softmax", scores, axis=-1)
    if wide != call.dtype:
        shares = emit("Cast", shares, to=int(call.dtype))
    if call.mask is not None and may_hide_rows(call):
        seen = call.mask if later is None else emit("And", call.mask, emit("Not", later))
        shares = emit("Where", seen, shares, emit.const(0, call.dtype.numpy()))
    result = emit("MatMul", shares, _every_head(call, call.v, emit, shapes))
    finish(call, result, Layout.FIRST, emit, shapes)


def finish(
    call: Attention, result: ir.Value, layout: Layout, emit: graph.Emitter, shapes: Shapes
) -> None:
    """Let ``result``, in ``layout``, stand for what the Attention computed, and remove that."""
    result.type = ir.TensorType(call.dtype)
    if result.shape is None:
        b, s, n, d = call.batch.known, call.queries.known, call.out.count, call.out.size
        dims = {Layout.FIRST: (b, n, s, d), Layout.LAST: (b, s, n, d), Layout.FLAT: (b, s, n * d)}
        result.shape = ir.Shape(dims[layout])
    dead = call.out.replace_by(result, layout, emit, shapes)
    graph.remove_dead([*dead, call.node])


def scaled(value: ir.Value, factor: float, dtype: ir.DataType, emit: graph.Emitter) -> ir.Value:
    """``value * factor``, or the value itself for a factor of 1."""
    if factor == 1:
        return value
    product = emit("Mul", value, emit.const(factor, dtype.numpy()))
    product.type, product.shape = ir.TensorType(dtype), value.shape
    return product


def added(call: Attention, emit: graph.Emitter) -> ir.Value:
    """The mask as a number to add to each score, in the element type of the operands.

    What a bool mask excludes gets the lowest finite number: kernels in half precision make NaN
    of ``-inf`` where a whole row is excluded. Such a row is then the mean of all values, where
    the operator says zero: see ``may_hide_rows``.
    """
    mask = call.mask
    if mask is None:
        raise TypeError("this attention has no mask")
    kind = _mask_type(mask)
    if kind == ir.DataType.BOOL:
        return emit("Where", mask, emit.const(0, call.dtype.numpy()), _lowest(call, emit))
    return mask if kind == call.dtype else emit("Cast", mask, to=int(call.dtype))


def may_hide_rows(call: Attention) -> bool:
    """Whether a bool mask may exclude every key of a query, whose result then is zero."""
    mask = call.mask
    if mask is None or _mask_type(mask) != ir.DataType.BOOL:
        return False
    if mask.const_value is None or mask.is_graph_input():
        return True
    seen = mask.const_value.numpy()
    return not (seen[..., 0] if call.causal else seen.any(axis=-1)).all()


def _mask_type(mask: ir.Value) -> ir.DataType | None:
    return mask.const_value.dtype if mask.const_value is not None else mask.dtype


def _lowest(call: Attention, emit: graph.Emitter) -> ir.Value:
    return emit.const(-weights.largest(call.dtype), call.dtype.numpy())


def _transposed(call: Attention, emit: graph.Emitter, shapes: Shapes) -> ir.Value:
    """Keys as ``[B, heads, D, Sk]``, by one Transpose if they come from ``[B, Sk, heads, D]``."""
    last = call.k.made_from(Layout.LAST, shapes) if call.k.layout == Layout.FIRST else None
    if last is not None and not call.is_grouped:
        return emit("Transpose", last, perm=list(_TRANSPOSED_LAST))
    return emit("Transpose", _every_head(call, call.k, emit, shapes), perm=list(_TRANSPOSED_FIRST))


def _every_head(call: Attention, heads: Heads, emit: graph.Emitter, shapes: Shapes) -> ir.Value:
    """``[B, heads, Sk, D]`` with one copy of k or v for each head of q that shares it."""
    value = heads.to(Layout.FIRST, emit, shapes)
    if not call.is_grouped:
        return value
    share = call.q.count // heads.count
    apart = emit("Reshape", value, emit.const([0, heads.count, 1, -1, heads.size]))
    copies = emit("Expand", apart, emit.const([1, 1, share, 1, 1]))
    return emit("Reshape", copies, emit.const([0, call.q.count, -1, heads.size]))


def _later(call: Attention, scores: ir.Value, emit: graph.Emitter) -> ir.Value:
    """Which keys come after the query, ``[Sq, Sk]``."""

    def count(dim: Dim, axis: int) -> ir.Value:
        if dim.known is not None:
            return emit.const(np.arange(dim.known))
        length = emit("Gather", emit("Shape", scores), emit.const(axis), axis=0)
        return emit("Range", emit.const(0), length, emit.const(1))

    rows = emit("Reshape", count(call.queries, 2), emit.const([-1, 1]))
    return emit("Less", rows, count(call.keys, 3))
