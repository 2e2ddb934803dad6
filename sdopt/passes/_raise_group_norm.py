"""Recognising GroupNorm: a normalisation of ``[B, groups, ...]`` between two Reshapes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import Dim, Dims
from sdopt.passes._raise_parts import (
    affine,
    emitter,
    is_filled,
    is_op,
    left,
    narrowed,
    parameter,
    recast,
    refusal,
    replace,
    uncast,
)
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

KIND = "group_norm"


@dataclass
class Grouped:
    """``y`` of the shape of ``x [B, C, ...]``, each of ``groups`` normalised to mean 0.

    ``core`` is what the statistics are taken of: in its type they are computed.
    """

    x: ir.Value
    y: ir.Value
    core: ir.Value
    groups: int
    dims: Dims
    channels: int | None


def raise_instance_norm(norm: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write Reshape, InstanceNormalization, Reshape, Mul, Add as one GroupNormalization."""
    source = norm.inputs[0]
    if source is None or graph.producer(uncast(source, shapes), "Reshape") is None:
        return False
    found = grouped(source, norm.outputs[0], shapes)
    if isinstance(found, str):
        return left(KIND, found, norm, ctx)
    if found is None:
        return False
    if not is_filled(norm.inputs[1], 1.0) or not is_filled(norm.inputs[2], 0.0):
        return left(KIND, "its InstanceNormalization scales each group", norm, ctx)
    epsilon = float(graph.attribute(norm, "epsilon", 1e-5))
    return write_group_norm(norm, found, epsilon, shapes, ctx)


def grouped(core: ir.Value, normed: ir.Value, shapes: Shapes) -> Grouped | str | None:
    """The ``[B, C, ...]`` values around a normalisation of ``core`` over all axes from 2 on.

    None where there are no two Reshapes, text where they are not those of a group norm.
    """
    inner = graph.producer(uncast(core, shapes), "Reshape")
    end = recast(normed)
    outer = graph.single_consumer(end)
    if inner is None or inner.inputs[0] is None:
        return None
    if not is_op(outer, "Reshape") or outer is None or outer.inputs[0] is not end:
        return None
    x = uncast(inner.inputs[0], shapes)
    dims, groups = shapes.dims(x), shapes.dims(inner.outputs[0])
    if groups is None or len(groups) < 3 or (count := groups[1].known) is None:
        return "its groups are not known"
    target = shapes.elements(inner.inputs[1])
    kept = bool(target) and target is not None and target[0] == Dim(0)
    kept = kept and not graph.attribute(inner, "allowzero", 0)
    if not kept and (dims is None or dims[0] != groups[0]):
        return "its groups run over the batch"
    if dims is None or len(dims) < 2:
        return "the number of its dimensions is not known"
    if not _shapes_back(outer, x, shapes):
        return "it is not reshaped back to the shape it had"
    y = recast(outer.outputs[0])
    y = y if shapes.dtype(y) == shapes.dtype(x) else outer.outputs[0]
    return Grouped(x, y, core, count, dims, dims[1].known)


def _shapes_back(outer: ir.Node, x: ir.Value, shapes: Shapes) -> bool:
    shape = graph.producer(outer.inputs[1], "Shape")
    if shape is not None and shape.inputs[0] is not None:
        part = graph.attribute(shape, "start", 0) or graph.attribute(shape, "end") is not None
        if not part and uncast(shape.inputs[0], shapes) is x:
            return True
    dims, target = shapes.dims(x), shapes.dims(outer.outputs[0])
    return dims is not None and target is not None and list(dims) == list(target)


def write_group_norm(
    node: ir.Node, found: Grouped, epsilon: float, shapes: Shapes, ctx: PassContext
) -> bool:
    """Write ``found`` and the affine step behind it as one GroupNormalization."""
    ends = affine(found.y, lambda value, default: _fits(value, default, found, shapes))
    channels = found.channels
    for lent in (ends.gamma, ends.beta):
        if channels is None and lent is not None and graph.scalar(lent) is None:
            channels = _channels_of(lent, found, shapes)
    if channels is None or channels % found.groups:
        return left(KIND, "its channels are not known, or not a multiple of its groups", node, ctx)
    raw, core, dtype = (shapes.dtype(value) for value in (found.x, found.core, found.y))
    dtype = dtype or raw or core
    if (reason := refusal(raw, core, dtype)) is not None or dtype is None:
        return left(KIND, reason or "its type is not known", node, ctx)
    out = ends.out
    if raw is not None and raw != dtype and (cast := narrowed(ends, found.x, shapes)) is not None:
        out, dtype = cast[0], raw
    emit = emitter(out, ctx)
    x = found.x if raw in (dtype, None) else emit("Cast", found.x, to=int(dtype))
    gamma = parameter(ends.gamma, [channels], 1.0, dtype, shapes, emit)
    beta = parameter(ends.beta, [channels], 0.0, dtype, shapes, emit)
    new = emit("GroupNormalization", x, gamma, beta, num_groups=found.groups, epsilon=epsilon)
    replace(out, new, shapes)
    ctx.count(KIND)
    return True


def _fits(value: ir.Value, default: float, found: Grouped, shapes: Shapes) -> bool:
    """Whether a factor or summand holds a number for each channel (or is none at all)."""
    array = graph.constant(value, most=1)
    if array is not None and array.size == 1 and array.ndim <= len(found.dims):
        return bool(array.item() == default)
    size = _channels_of(value, found, shapes)
    return size is not None and found.channels in (None, size)


def _channels_of(value: ir.Value, found: Grouped, shapes: Shapes) -> int | None:
    """C of a value of ``[C, 1, ...]`` or ``[1, C, 1, ...]`` that meets axis 1 of ``found``."""
    dims = [dim.known for dim in shapes.dims(value) or ()]
    rank = len(found.dims)
    if len(dims) == rank and dims[0] == 1:
        dims = dims[1:]
    is_vector = len(dims) == rank - 1 and dims[1:] == [1] * (rank - 2)
    return dims[0] if is_vector and dims[0] != 1 else None


def absorb_affine(norm: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Move a Mul and an Add behind a GroupNormalization without a scale of its own into it.

    Opset 18 had one scale for each group, so exporters wrote the one for each channel behind it.
    """
    x, dims = norm.inputs[0], shapes.dims(norm.inputs[0])
    groups = int(graph.attribute(norm, "num_groups", 0))
    if x is None or dims is None or len(dims) < 2 or dims[1].known is None:
        return False
    if not is_filled(norm.inputs[1], 1.0) or not is_filled(norm.inputs[2], 0.0):
        return False
    found = Grouped(x, norm.outputs[0], x, groups, dims, dims[1].known)
    ends = affine(found.y, lambda value, default: _fits(value, default, found, shapes))
    if ends.out is found.y:
        return False
    return write_group_norm(
        norm, found, float(graph.attribute(norm, "epsilon", 1e-5)), shapes, ctx
    )
