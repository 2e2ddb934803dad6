"""Recognising a normalisation by mean and deviation: LayerNorm, RMSNorm, and GroupNorm by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_group_norm import grouped, write_group_norm
from sdopt.passes._raise_parts import (
    affine,
    emitter,
    is_op,
    left,
    narrowed,
    other,
    parameter,
    recast,
    refusal,
    replace,
    uncast,
)
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

_OPERATORS = {"layer_norm": "LayerNormalization", "rms_norm": "RMSNormalization"}


@dataclass
class _Normed:
    """``out = d / sqrt(mean(d * d) + epsilon)``; d is x, or x less its mean."""

    kind: str
    x: ir.Value
    out: ir.Value
    axes: set[int]
    epsilon: float


def raise_norm(root: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write the norm whose deviation is ``root``, a Sqrt or a Pow by a half, as one node."""
    found = _normed(root, shapes)
    if found is None:
        return False
    if isinstance(found, tuple):
        return left(*found, root, ctx)
    dims = shapes.dims(found.x)
    if dims is None:
        return left(found.kind, "the number of its dimensions is not known", root, ctx)
    if found.kind == "layer_norm" and found.axes == set(range(2, len(dims))):
        whole = grouped(found.x, found.out, shapes)
        # With a group to each channel it may as well be a LayerNorm of what has axis 1 for rows.
        if whole is not None and not isinstance(whole, str) and whole.channels != whole.groups:
            return write_group_norm(root, whole, found.epsilon, shapes, ctx)
    first = len(dims) - len(found.axes)
    if found.axes != set(range(first, len(dims))):
        return left(found.kind, "its mean does not run over the last axes", root, ctx)
    sizes = [size for dim in dims[first:] if (size := dim.known) is not None]
    if len(sizes) != len(found.axes):
        return left(found.kind, "its width is not known", root, ctx)
    return _write(root, found, sizes, shapes, ctx)


def _write(
    root: ir.Node, found: _Normed, sizes: list[int], shapes: Shapes, ctx: PassContext
) -> bool:
    def fits(value: ir.Value, default: float) -> bool:
        dims = [dim.known for dim in shapes.dims(value) or ()]
        while len(dims) > len(sizes) and dims[0] == 1:
            dims = dims[1:]
        return dims == sizes and len(shapes.dims(value) or ()) <= len(shapes.dims(found.x) or ())

    shifts = found.kind == "layer_norm"
    raw, x, y = uncast(found.x, shapes), found.x, found.out
    dtype, narrow = shapes.dtype(y) or shapes.dtype(x), recast(found.out)
    if narrow is not y and shapes.dtype(narrow) == shapes.dtype(raw):
        x, y, dtype = raw, narrow, shapes.dtype(raw)
    ends, core = affine(y, fits, shifts=shifts), shapes.dtype(root.outputs[0])
    out = ends.out
    if shapes.dtype(raw) != dtype and (cast := narrowed(ends, raw, shapes)) is not None:
        x, out, dtype = raw, cast[0], shapes.dtype(raw)
    if (reason := refusal(shapes.dtype(raw), core, dtype)) is not None or dtype is None:
        return left(found.kind, reason or "its type is not known", root, ctx)
    emit = emitter(out, ctx)
    x = x if shapes.dtype(x) in (dtype, None) else emit("Cast", x, to=int(dtype))
    inputs = [x, parameter(ends.gamma, sizes, 1.0, dtype, shapes, emit)]
    if ends.beta is not None:
        inputs.append(parameter(ends.beta, sizes, 0.0, dtype, shapes, emit))
    operator, axis = _OPERATORS[found.kind], -len(sizes)
    replace(out, emit(operator, *inputs, axis=axis, epsilon=found.epsilon), shapes)
    ctx.count(found.kind)
    return True


def _normed(root: ir.Node, shapes: Shapes) -> _Normed | tuple[str, str] | None:
    """What ``root`` is the deviation of; a kind and a reason where it nearly is one's."""
    add = graph.producer(root.inputs[0], "Add")
    inverse = _is_inverse(root)
    if add is None or inverse is None:
        return None
    for mean_value, constant in (add.inputs[:2], add.inputs[1::-1]):
        mean, epsilon = graph.producer(mean_value, "ReduceMean"), graph.scalar(constant)
        if mean is not None and epsilon is not None:
            break
    else:
        return None
    squared = _squared(mean.inputs[0])
    if squared is None:
        return None
    deviation = uncast(squared, shapes)
    centred = _centred(deviation, shapes)
    kind = "rms_norm" if centred is None else "layer_norm"
    quotient = _quotient(root.outputs[0], deviation, inverse, shapes)
    if quotient is None:
        return kind, "its deviation divides something else"
    axes = shapes.axes(mean)
    if axes is None or not graph.attribute(mean, "keepdims", 1):
        return kind, "the axes of its mean are not known, or are dropped"
    if centred is None:
        return _Normed(kind, quotient[0], quotient[1], axes, epsilon)
    if shapes.axes(centred) != axes or not graph.attribute(centred, "keepdims", 1):
        return kind, "its mean and its variance run over different axes"
    assert centred.inputs[0] is not None
    return _Normed(kind, centred.inputs[0], quotient[1], axes, epsilon)


def _is_inverse(root: ir.Node) -> bool | None:
    """Whether ``root`` is 1 over the deviation; None if it is something else."""
    if root.op_type == "Sqrt":
        return False
    return {0.5: False, -0.5: True}.get(graph.scalar(root.inputs[1]) or 0.0)


def _squared(value: ir.Value | None) -> ir.Value | None:
    """The value that ``value`` is the square of."""
    if (power := graph.producer(value, "Pow")) is not None:
        return power.inputs[0] if graph.scalar(power.inputs[1]) == 2 else None
    mul = graph.producer(value, "Mul")
    return mul.inputs[0] if mul is not None and mul.inputs[0] is mul.inputs[1] else None


def _centred(value: ir.Value, shapes: Shapes) -> ir.Node | None:
    """The ReduceMean whose result is subtracted from its own source to get ``value``."""
    sub = graph.producer(value, "Sub")
    if sub is None or sub.inputs[0] is None or sub.inputs[1] is None:
        return None
    mean = graph.producer(uncast(sub.inputs[1], shapes), "ReduceMean")
    if mean is None or mean.inputs[0] is None:
        return None
    same = uncast(mean.inputs[0], shapes) is uncast(sub.inputs[0], shapes)
    return mean if same else None


def _quotient(
    root: ir.Value, deviation: ir.Value, inverse: bool, shapes: Shapes
) -> tuple[ir.Value, ir.Value] | None:
    """``d`` and ``d / root``, or d times 1 / root, whichever is there; d may be cast."""
    for value, is_inverse in _inverses(root, inverse):
        for user in value.consumers():
            if is_inverse and is_op(user, "Mul"):
                d = other(user, value)
            elif not is_inverse and is_op(user, "Div") and user.inputs[1] is value:
                d = user.inputs[0]
            else:
                continue
            if d is not None and uncast(d, shapes) is deviation:
                return d, user.outputs[0]
    return None


def _inverses(root: ir.Value, inverse: bool) -> Iterator[tuple[ir.Value, bool]]:
    """``root`` and what is made of it by Cast and Reciprocal, and whether it is 1 over it."""
    yield root, inverse
    for user in root.consumers():
        turns = is_op(user, "Reciprocal") or (
            is_op(user, "Div") and user.inputs[1] is root and graph.scalar(user.inputs[0]) == 1
        )
        if turns or is_op(user, "Cast"):
            yield from _inverses(user.outputs[0], inverse != turns)
