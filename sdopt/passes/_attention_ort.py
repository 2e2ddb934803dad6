"""``flash_attention=ort``: com.microsoft's MultiHeadAttention, plain or with packed operands."""

from __future__ import annotations

from typing import ClassVar, Literal

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes import _linear
from sdopt.passes._attention import Attention, Kernel, broadcasts
from sdopt.passes._attention_decomposed import added, finish, may_hide_rows
from sdopt.passes._heads import Layout
from sdopt.passes._raise_dims import ONE
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

MICROSOFT = "com.microsoft"
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_AXES_ARE_AN_INPUT = 18
"""The opset since which ReduceMax reads them so."""

Packing = Literal["none", "kv", "qkv"]


class MultiHeadAttention(Kernel):
    """``[B, S, heads * D]`` operands; a mask is its ``attention_bias [B|1, heads|1, Sq, Sk]``."""

    domain: ClassVar[str] = MICROSOFT

    def __init__(self, packed: Packing = "none") -> None:
        self._packed = packed

    def refusal(self, call: Attention) -> str | None:
        """Why the kernel cannot take this attention."""
        if call.is_grouped:
            return "heads share keys and values (grouped query attention)"
        if call.dtype not in _TYPES:
            return f"MultiHeadAttention has no kernel for {call.dtype.name.lower()}"
        if call.causal and call.queries != call.keys:
            # ONNX counts both from the first, onnxruntime from the last (1.31).
            return "it is causal, and its queries are not known to be as many as its keys"
        if may_hide_rows(call) and (call.causal or not _same_for_heads(call)):
            return "its bool mask may hide all keys of a query, which MultiHeadAttention averages"
        return None

    def write(self, call: Attention, shapes: Shapes, ctx: PassContext) -> bool:
        """Replace the node."""
        emit = ctx.emitter(call.node, f"{graph.module_path(call.node)}/flash_attention")
        operands = self._operands(call, emit, shapes, ctx)
        bias = _bias(call, operands, emit) if call.mask is not None else None
        if bias is not None:
            operands = [*operands, None, None, bias]
        extra: dict[str, float] = {"unidirectional": 1} if call.causal else {}
        if graph.attribute(call.node, "scale", None) is not None:
            extra["scale"] = call.scale
        fused = emit(
            "MultiHeadAttention", *operands, domain=MICROSOFT, num_heads=call.q.count, **extra
        )
        if call.mask is not None and may_hide_rows(call):
            number = call.dtype.numpy()
            seen = _seen(call.mask, len(call.mask_dims), graph.opset(ctx.model), emit)
            fused = emit("Where", seen, fused, emit.const(0, number))
        finish(call, fused, Layout.FLAT, emit, shapes)
        return True

    def _operands(
        self, call: Attention, emit: graph.Emitter, shapes: Shapes, ctx: PassContext
    ) -> list[ir.Value | None]:
        parts = (call.q, call.k, call.v)
        if self._packed == "none":
            return [part.to(Layout.FLAT, emit, shapes) for part in parts]
        linears = [_projection(part.made_from(Layout.FLAT, shapes)) for part in parts]
        q, k, v = linears
        reason: str | None = "its projections are no MatMuls of their own (leave fuse_qkv out)"
        if k is not None and v is not None:
            reason = _unpackable(call, [k, v])
            if reason is None and self._packed == "qkv" and q is not None:
                all_three = [q, k, v]
                if _unpackable(call, all_three) is None:
                    ctx.count("packed_attention")
                    return [_pack(all_three, call, emit)]
            if reason is None:
                ctx.count("packed_attention")
                return [call.q.to(Layout.FLAT, emit, shapes), _pack([k, v], call, emit)]
        ctx.skip(f"not packed: {reason}", call.node, kind="packed_attention")
        return [part.to(Layout.FLAT, emit, shapes) for part in parts]


def _bias(call: Attention, flat: list[ir.Value | None], emit: graph.Emitter) -> ir.Value:
    """The mask with four axes, the last two in full: the kernel broadcasts the first two only."""
    mask, rank = added(call, emit), len(call.mask_dims)
    if rank < 4:
        mask = emit("Unsqueeze", mask, emit.const(list(range(4 - rank))))
    short = broadcasts(call.mask_dims, -2, call.queries)
    if short or broadcasts(call.mask_dims, -1, call.keys):
        lengths = [emit("Shape", one, start=1, end=2) for one in flat[:2]]
        mask = emit("Expand", mask, emit("Concat", emit.const([1, 1]), *lengths, axis=0))
    return mask


def _same_for_heads(call: Attention) -> bool:
    return len(call.mask_dims) < 3 or call.mask_dims[-3] == ONE


def _seen(mask: ir.Value, rank: int, opset: int, emit: graph.Emitter) -> ir.Value:
    """Which queries see any key, ``[B|1, Sq|1, 1]``, of a mask that is one for all heads."""
    number = emit("Cast", mask, to=int(ir.DataType.FLOAT))
    if opset >= _AXES_ARE_AN_INPUT:
        most = emit("ReduceMax", number, emit.const([-1]), keepdims=1)
    else:
        most = emit("ReduceMax", number, axes=[-1], keepdims=1)
    if rank > 2:
        most = emit("Squeeze", most, emit.const([-3]))
    return emit("Cast", most, to=int(ir.DataType.BOOL))


def _projection(value: ir.Value | None) -> _linear.Linear | None:
    return _linear.match(value) if value is not None else None


def _unpackable(call: Attention, linears: list[_linear.Linear]) -> str | None:
    first = linears[0]
    if call.mask is not None or call.causal:
        return "packed operands take no mask"
    if any(linear.x is not first.x for linear in linears):
        return "its projections read different inputs"
    if len({linear.matmul for linear in linears}) < len(linears):
        return "two of the projections are one and the same node"
    if call.q.size != call.v.size:
        return "its values have another head size than its keys"
    for linear in linears:
        if linear.transposed != first.transposed or linear.weight.dtype != first.weight.dtype:
            return "its projections store their weights differently"
        if (linear.bias is None) != (first.bias is None):
            return "only some of its projections have a bias"
        if list(linear.weight.shape.numpy()) != list(first.weight.shape.numpy()):
            return "its projections are of different sizes"
    return None


def _pack(linears: list[_linear.Linear], call: Attention, emit: graph.Emitter) -> ir.Value:
    """One projection to ``[B, S, heads, 2 or 3, D]``, its weight interleaved head by head."""
    first, heads = linears[0], call.q.count
    axis = 0 if first.transposed else 1
    tensors = [linear.weight for linear in linears]
    weight = emit.weight(weights.interleave(tensors, heads, axis), "weight")
    if first.transposed:
        weight = emit("Transpose", weight, perm=[1, 0])
    joined = emit("MatMul", first.x, weight)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        joined = emit("Add", joined, emit.weight(weights.interleave(biases, heads), "bias"))
    shape = emit.const([0, 0, heads, len(linears), call.q.size])
    return emit("Reshape", joined, shape)
