"""Recognising attention written out as product, Softmax and product, in 2-D to 4-D."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_masks import Masks, MaskWriter, check_masks
from sdopt.passes._raise_operands import Operands, check_batches
from sdopt.passes._raise_scale import NotRaisedError, scale
from sdopt.passes._raise_scores import Scores, match
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

KIND = "attention"


def raise_attention(softmax: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write the attention around ``softmax`` as one Attention of ``[B, heads, S, D]``.

    What is an attention and stays is said to ``ctx``; a Softmax without two products of computed
    values around it is none, and nothing is said.
    """
    try:
        found = match(softmax, shapes)
        if found is None:
            return False
        check_batches(found.first, shapes, "q and k")
        check_batches(found.second, shapes, "the probabilities and v")
        masks = check_masks(found, shapes)
        operands = Operands(found, shapes)
        number = scale(operands.factors, _width(found, shapes), shapes)
    except NotRaisedError as reason:
        ctx.skip(str(reason), softmax, kind=KIND)
        return False
    extra: dict[str, Any] = {} if number is None else {"scale": number}
    if masks.causal:
        extra["is_causal"] = 1
    wide = shapes.dtype(softmax.inputs[0]) == ir.DataType.FLOAT
    if wide and operands.dtype != ir.DataType.FLOAT:
        extra["softmax_precision"] = int(ir.DataType.FLOAT)
    _write(found, operands, masks, extra, shapes, ctx)
    ctx.count(KIND)
    return True


def already_attention(node: ir.Node, ctx: PassContext) -> None:
    """Record that ``node``, an Attention, was there before."""
    ctx.already(KIND)


def _width(found: Scores, shapes: Shapes) -> Any:
    """The size of a head of q."""
    dims = shapes.dims(found.q)
    return dims[found.axes["q"].index("d")] if dims is not None else None


def _write(
    found: Scores,
    operands: Operands,
    masks: Masks,
    extra: dict[str, Any],
    shapes: Shapes,
    ctx: PassContext,
) -> None:
    node = found.second.node
    emit = ctx.emitter(node, f"{graph.module_path(node)}/raise_ops")
    inputs = operands.write(emit)
    for value in inputs:
        shapes.show(value)
    mask = MaskWriter(found, operands, shapes, emit).write(masks)
    out = emit("Attention", *inputs, *([] if mask is None else [mask]), **extra)
    q, v = shapes.dims(inputs[0]), shapes.dims(inputs[2])
    dims = None if q is None or v is None else [*q[:3], v[-1]]
    shapes.declare(out, dims, operands.dtype)
    graph.remove_dead(operands.put_back(out, emit))
