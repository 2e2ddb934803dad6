"""Recognising GroupNorm around InstanceNormalization, and LayerNorm and RMSNorm by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._raise_dims import Dim
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext


def raise_group_norm(norm: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write Reshape, InstanceNormalization, Reshape, Mul, Add as one GroupNormalization."""
    inner = graph.producer(norm.inputs[0], "Reshape")
    outer = graph.single_consumer(norm.outputs[0])
    if inner is None or outer is None or outer.op_type != "Reshape":
        return False
    x, grouped = inner.inputs[0], shapes.elements(inner.inputs[1])
    dims, groups = shapes.dims(x), shapes.dims(inner.outputs[0])
    if x is None or groups is None or len(groups) != 3 or groups[1].known is None:
        return _left("its groups are not known", norm, ctx)
    first = grouped[0] if grouped else None
    if not (first == Dim(0) or (dims is not None and dims[0] == groups[0])):
        return _left("its groups run over the batch", norm, ctx)
    if not _shapes_back(outer, x, shapes):
        return _left("it is not reshaped back to the shape it had", norm, ctx)
    if not _is_filled(norm.inputs[1], 1.0) or not _is_filled(norm.inputs[2], 0.0):
        return _left("its InstanceNormalization scales each group", norm, ctx)
    affine = _affine(outer.outputs[0], shapes)
    channels = dims[1].known if dims is not None else None
    if channels is None and affine.gamma is not None and (lent := shapes.dims(affine.gamma)):
        channels = lent[0].known if len(lent) > 1 else None
    if channels is None or channels % groups[1].known:
        return _left("its channels are not known, or not a multiple of its groups", norm, ctx)
    dtype = shapes.dtype(x) or shapes.dtype(norm.inputs[1])
    whole = [_is_per_channel(value, channels, shapes) for value in (affine.gamma, affine.beta)]
    out = affine.out if all(whole) else outer.outputs[0]
    if dtype is None:
        return _left("its type is not known", norm, ctx)
    emit = ctx.emitter(_anchor(out), f"{graph.module_path(norm)}/raise_ops")
    if affine.gamma is not None and affine.beta is not None and all(whole):
        gamma = _vector(affine.gamma, channels, shapes, emit)
        beta = _vector(affine.beta, channels, shapes, emit)
    else:
        gamma = emit.weight(weights.full([channels], 1.0, dtype), "scale")
        beta = emit.weight(weights.full([channels], 0.0, dtype), "bias")
    epsilon = float(graph.attribute(norm, "epsilon", 1e-5))
    new = emit("GroupNormalization", x, gamma, beta, num_groups=groups[1].known, epsilon=epsilon)
    _replace(out, new, shapes)
    ctx.count("group norm")
    return True


def _shapes_back(outer: ir.Node, x: ir.Value, shapes: Shapes) -> bool:
    shape = graph.producer(outer.inputs[1], "Shape")
    if shape is not None and shape.inputs[0] is x and not shape.attributes:
        return True
    dims, target = shapes.dims(x), shapes.dims(outer.outputs[0])
    return dims is not None and target is not None and list(dims) == list(target)


def _is_filled(value: ir.Value | None, number: float) -> bool:
    array = graph.constant(value)
    return array is not None and bool(np.all(array == number))


@dataclass
class _Affine:
    """``out = y * gamma + beta``; where there is neither, ``out`` is y."""

    out: ir.Value
    gamma: ir.Value | None = None
    beta: ir.Value | None = None


def _affine(y: ir.Value, shapes: Shapes) -> _Affine:
    """The Mul by a parameter and the Add of one behind ``y``."""
    mul = graph.single_consumer(y)
    if mul is None or mul.op_type != "Mul":
        return _Affine(y)
    gamma = _other(mul, y)
    scaled = _Affine(mul.outputs[0], gamma)
    add = graph.single_consumer(mul.outputs[0])
    if gamma is None or add is None or add.op_type != "Add":
        return scaled
    beta = _other(add, mul.outputs[0])
    if beta is None or shapes.dims(beta) != shapes.dims(gamma):
        return scaled
    return _Affine(add.outputs[0], gamma, beta)


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    sides = [side for side in node.inputs if side is not value]
    return sides[0] if len(sides) == 1 else None


def _is_per_channel(value: ir.Value | None, size: int, shapes: Shapes) -> bool:
    dims = [dim.known for dim in shapes.dims(value) or ()]
    return len(dims) > 2 and dims in ([size, 1, 1], [1, size, 1, 1])


def _vector(value: ir.Value, size: int, shapes: Shapes, emit: graph.Emitter) -> ir.Value:
    """A parameter of ``[C, 1, 1]`` or ``[1, C, 1, 1]`` as ``[C]``; never read."""
    node = value.producer()
    if node is not None and node.op_type in ("Unsqueeze", "Reshape"):
        source = node.inputs[0]
        if source is not None and [d.known for d in shapes.dims(source) or ()] == [size]:
            return source
    return emit("Reshape", value, emit.const([size]))


def raise_layer_norm(root: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write the norm whose ``Sqrt(mean + epsilon)`` is ``root`` as one node."""
    add = graph.producer(root.inputs[0], "Add")
    if add is None:
        return False
    for mean_value, constant in (add.inputs[:2], add.inputs[1::-1]):
        mean, epsilon = graph.producer(mean_value, "ReduceMean"), graph.scalar(constant)
        if mean is not None and epsilon is not None:
            break
    else:
        return False
    squared = _squared(mean.inputs[0])
    if squared is None:
        return False
    dims = shapes.dims(squared)
    if not graph.attribute(mean, "keepdims", 1) or not _is_last(mean, shapes):
        return _left("its mean does not run over the last axis", root, ctx)
    width = dims[-1].known if dims is not None else None
    if width is None:
        return _left("its width is not known", root, ctx)
    normed = _normed(root, squared)
    if normed is None:
        return _left("its deviation divides something else", root, ctx)
    centred = _centred(squared, shapes)
    source, kind = (squared, "rms norm") if centred is None else (centred, "layer norm")
    _write(kind, source, width, epsilon, _affine(normed, shapes), normed, shapes, ctx)
    return True


def _write(
    kind: str,
    x: ir.Value,
    width: int,
    epsilon: float,
    affine: _Affine,
    normed: ir.Value,
    shapes: Shapes,
    ctx: PassContext,
) -> None:
    gamma, beta, out = affine.gamma, affine.beta, affine.out
    if [dim.known for dim in shapes.dims(gamma) or ()] != [width]:
        gamma, beta, out = None, None, normed
    if kind == "rms norm" and beta is not None and gamma is not None:
        beta, out = None, _product(normed)
    node = _anchor(out)
    emit = ctx.emitter(node, f"{graph.module_path(node)}/raise_ops")
    if gamma is None:
        dtype = shapes.dtype(x) or ir.DataType.FLOAT
        gamma = emit.weight(weights.full([width], 1.0, dtype), "scale")
    inputs = [x, gamma, *([beta] if beta is not None else [])]
    op = "LayerNormalization" if kind == "layer norm" else "RMSNormalization"
    _replace(out, emit(op, *inputs, axis=-1, epsilon=epsilon), shapes)
    ctx.count(kind)


def _centred(value: ir.Value, shapes: Shapes) -> ir.Value | None:
    """The x of ``x - mean(x)`` over the last axis."""
    sub = graph.producer(value, "Sub")
    mean = graph.producer(sub.inputs[1], "ReduceMean") if sub is not None else None
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0]:
        return None
    whole = graph.attribute(mean, "keepdims", 1) and _is_last(mean, shapes)
    return sub.inputs[0] if whole else None


def _product(normed: ir.Value) -> ir.Value:
    user = graph.single_consumer(normed)
    assert user is not None
    return user.outputs[0]


def _squared(value: ir.Value | None) -> ir.Value | None:
    """The value that ``value`` is the square of."""
    if (power := graph.producer(value, "Pow")) is not None:
        return power.inputs[0] if graph.scalar(power.inputs[1]) == 2 else None
    mul = graph.producer(value, "Mul")
    return mul.inputs[0] if mul is not None and mul.inputs[0] is mul.inputs[1] else None


def _is_last(mean: ir.Node, shapes: Shapes) -> bool:
    axes, dims = shapes.elements(mean.inputs[1]) if len(mean.inputs) > 1 else None, None
    dims = shapes.dims(mean.inputs[0])
    if axes is None or len(axes) != 1:
        return False
    return axes[0] == Dim(-1) or (dims is not None and axes[0].known == len(dims) - 1)


def _normed(root: ir.Node, d: ir.Value) -> ir.Value | None:
    """``d / root`` or ``d * (1 / root)``, whichever is there."""
    for user in root.outputs[0].consumers():
        if user.op_type == "Div" and user.inputs[1] is root.outputs[0]:
            if user.inputs[0] is d:
                return user.outputs[0]
            if graph.scalar(user.inputs[0]) != 1:
                continue
        elif user.op_type != "Reciprocal":
            continue
        for product in user.outputs[0].consumers():
            if product.op_type == "Mul" and _other(product, user.outputs[0]) is d:
                return product.outputs[0]
    return None


def _anchor(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _replace(old: ir.Value, new: ir.Value, shapes: Shapes) -> None:
    shapes.stands_for(new, old)
    node = _anchor(old)
    graph.replace_uses(old, new)
    graph.remove_dead([node])


def _left(reason: str, node: ir.Node, ctx: PassContext) -> bool:
    ctx.skip(reason, node)
    return False
