"""Recognising attention written out as MatMul, Softmax and MatMul, in 4-D and in 3-D."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._raise_dims import ONE
from sdopt.passes._raise_operands import (
    NotRaisedError,
    broad_mask,
    check_mask,
    check_operands,
    merged_shape,
    operands,
)
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

_FLOAT = int(ir.DataType.FLOAT)


@dataclass
class _Scores:
    """``scale * (a @ b) + mask`` behind a Softmax; the scale is ``number * D ** power``."""

    matmul: ir.Node
    factors: list[tuple[ir.Value, int]] = field(default_factory=list)
    mask: ir.Value | None = None


def raise_attention(softmax: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write the attention around ``softmax`` as one Attention of ``[B, heads, S, D]``."""
    product = _reader(softmax)
    if product is None or softmax.inputs[0] is None:
        return False
    try:
        scores = _scores(softmax.inputs[0], shapes)
        if scores is None:
            return False
        _check_axis(softmax, shapes)
        _check_rank(softmax, scores, shapes)
        _write(softmax, product, scores, shapes, ctx)
    except NotRaisedError as reason:
        ctx.skip(str(reason), product)
        return False
    ctx.count("attention")
    return True


def _reader(softmax: ir.Node) -> ir.Node | None:
    """The MatMul that multiplies the probabilities with v, maybe behind a Cast."""
    value = softmax.outputs[0]
    user = graph.single_consumer(value)
    if user is not None and user.op_type == "Cast":
        value = user.outputs[0]
        user = graph.single_consumer(value)
    is_product = user is not None and user.op_type == "MatMul" and not user.domain
    return user if is_product and user is not None and user.inputs[0] is value else None


def _check_axis(softmax: ir.Node, shapes: Shapes) -> None:
    axis, dims = graph.attribute(softmax, "axis", -1), shapes.dims(softmax.inputs[0])
    if axis != -1 and (dims is None or axis != len(dims) - 1):
        raise NotRaisedError(f"its Softmax runs over axis {axis}, not over the keys")


def _check_rank(softmax: ir.Node, scores: _Scores, shapes: Shapes) -> None:
    """A scale of shape ``[1, 1, 1, 1, 1]`` makes 5-D scores of 4-D ones."""
    before, after = shapes.dims(scores.matmul.outputs[0]), shapes.dims(softmax.inputs[0])
    if before is not None and after is not None and len(before) != len(after):
        raise NotRaisedError("a scale or a mask adds an axis to its scores")


def _scores(value: ir.Value, shapes: Shapes) -> _Scores | None:
    """What is between the first MatMul and the Softmax; None if there is no such MatMul."""
    factors: list[tuple[ir.Value, int]] = []
    zeros: list[ir.Value] = []
    mask: ir.Value | None = None
    while (node := value.producer()) is not None and node.domain in ("", "ai.onnx"):
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "MatMul":
            for one in zeros:
                _check_fits(one, node, shapes)
            return _Scores(node, factors, mask)
        if first is None:
            return None
        if node.op_type == "Cast":
            value = first
        elif node.op_type in ("Mul", "Div") and (scaled := _scaled(node, shapes)) is not None:
            factors.append(scaled[1:])
            value = scaled[0]
        elif node.op_type == "Add" and node.inputs[1] is not None:
            sides = [(first, node.inputs[1]), (node.inputs[1], first)]
            found = [(s, other) for s, other in sides if _leads_to_product(s, shapes)]
            if len(found) != 1:
                return None
            value, other = found[0]
            if _is_zero(other):
                zeros.append(other)
            elif mask is not None or factors:
                raise NotRaisedError("its mask is one of several, or is scaled with the scores")
            else:
                mask = other
        else:
            return None
    return None


def _leads_to_product(value: ir.Value, shapes: Shapes) -> bool:
    while (node := value.producer()) is not None and node.domain in ("", "ai.onnx"):
        if node.op_type == "MatMul":
            return True
        scaled = _scaled(node, shapes) if node.op_type in ("Mul", "Div") else None
        if scaled is not None:
            value = scaled[0]
        elif node.op_type == "Cast" and node.inputs[0] is not None:
            value = node.inputs[0]
        elif node.op_type == "Add":
            rest = [side for side in node.inputs if side is not None and not _is_zero(side)]
            if len(rest) != 1:
                return False
            value = rest[0]
        else:
            return False
    return False


def _scaled(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, ir.Value, int] | None:
    """The scaled value, the one-element scale, and 1 or -1 for multiplied or divided."""
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return None
    if _is_scalar(b, shapes):
        return a, b, 1 if node.op_type == "Mul" else -1
    return (b, a, 1) if node.op_type == "Mul" and _is_scalar(a, shapes) else None


def _is_scalar(value: ir.Value, shapes: Shapes) -> bool:
    if graph.scalar(value) is not None:
        return True
    while (node := value.producer()) is not None:
        elements = shapes.elements(value)
        if elements is not None:
            return len(elements) == 1
        if node.op_type in ("Mul", "Div"):
            return all(side is not None and _is_scalar(side, shapes) for side in node.inputs)
        if node.op_type not in ("Sqrt", "Cast", "Reciprocal") or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


def _is_zero(value: ir.Value) -> bool:
    """Zeros, as ``baddbmm(empty, q, k, beta=0)`` leaves them behind."""
    node, tensor = value.producer(), value.const_value
    if node is not None and node.op_type == "Constant":
        tensor = graph.constant_tensor(node)
    if tensor is not None and not value.is_graph_input():
        # Static exports fold them to a constant as large as the scores.
        return tensor.dtype.is_floating_point() and weights.extremes(tensor) == (0, 0)
    if node is None:
        return False
    if node.op_type == "ConstantOfShape":
        fill = graph.attribute(node, "value")
        return fill is None or not fill.numpy().any()
    if node.op_type == "Mul":
        sides = [side for side in node.inputs if side is not None]
        zeros = [_is_zero(side) for side in sides]
        scalars = [graph.scalar(side) is not None for side in sides]
        return any(zeros) and all(a or b for a, b in zip(zeros, scalars, strict=True))
    return (
        node.op_type in ("Expand", "Cast")
        and node.inputs[0] is not None
        and _is_zero(node.inputs[0])
    )


def _check_fits(zeros: ir.Value, product: ir.Node, shapes: Shapes) -> None:
    """Zeros may only be forgotten where adding them does not widen the scores.

    Where nobody knows that q and k have one batch, zeros of the batch of either do not.
    """
    q, k, scores = [shapes.dims(value) for value in (*product.inputs, product.outputs[0])]
    found = shapes.dims(zeros)
    if found is None or q is None or k is None or scores is None or len(found) > len(scores):
        raise NotRaisedError("zeros of an unknown shape are added to its scores")
    for axis in range(-len(found), 0):
        fitting = {ONE, scores[axis]}
        if axis < -2:
            fitting |= {dims[axis] for dims in (q, k) if len(dims) >= -axis}
        if found[axis] not in fitting:
            raise NotRaisedError("zeros of another shape are added to its scores")


def _write(
    softmax: ir.Node, product: ir.Node, scores: _Scores, shapes: Shapes, ctx: PassContext
) -> None:
    emit = ctx.emitter(product, f"{graph.module_path(product)}/raise_ops")
    factors = list(scores.factors)
    q = _unscaled(scores.matmul.inputs[0], factors, shapes)
    kt = _unscaled(scores.matmul.inputs[1], factors, shapes)
    transpose, inner = graph.producer(kt, "Transpose"), None
    if transpose is not None:
        inner = _unscaled(transpose.inputs[0], factors, shapes)
    types = {shapes.dtype(value) for value in (q, scores.matmul.inputs[1], product.inputs[1])}
    if len(types) > 1:
        raise NotRaisedError("q, k and v are not known to have one type")
    scale = _scale(factors, q, shapes)
    if scores.mask is not None:
        check_mask(scores.mask, shapes.dims(scores.matmul.outputs[0]), shapes)
    check_operands(q, kt, product.inputs[1], shapes)
    if transpose is not None and inner is not transpose.inputs[0]:
        unscaled = emit("Transpose", inner, perm=list(graph.attribute(transpose, "perm")))
        shapes.stands_for(unscaled, kt)
        kt = unscaled
    is_split = scores.mask is None or len(shapes.dims(scores.mask) or ()) == 2
    found = operands(q, kt, product, shapes, emit, whole=not is_split)
    extra: dict[str, Any] = {} if scale is None else {"scale": scale}
    if _widens(softmax, shapes, types):
        extra["softmax_precision"] = _FLOAT
    inputs = [found.q, found.k, found.v]
    if scores.mask is not None:
        inputs.append(broad_mask(scores.mask, shapes, emit, found.single))
    out = emit("Attention", *inputs, **extra)
    if found.single:
        out = emit("Squeeze", out, emit.const([1]))
    for value in inputs[:3]:
        shapes.show(value)
    for old in found.outs:
        shapes.stands_for(out, old)
        graph.replace_uses(old, out)
    for old in found.measured:
        graph.replace_uses(old, merged_shape(out, found.heads, emit))
    graph.remove_dead(
        [product, *(node for old in (*found.outs, *found.measured) if (node := old.producer()))]
    )


def _widens(softmax: ir.Node, shapes: Shapes, types: set[ir.DataType | None]) -> bool:
    """Whether the Softmax of a half-precision attention runs in float32."""
    if graph.producer(softmax.inputs[0], "Cast") is None:
        return False
    return shapes.dtype(softmax.inputs[0]) == ir.DataType.FLOAT and ir.DataType.FLOAT not in types


def _unscaled(
    value: ir.Value | None, factors: list[tuple[ir.Value, int]], shapes: Shapes
) -> ir.Value:
    """``value`` before it was scaled; the scale goes to ``factors``."""
    assert value is not None
    while (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        scaled = _scaled(node, shapes)
        if scaled is None:
            break
        factors.append(scaled[1:])
        value = scaled[0]
    return value


def _scale(factors: list[tuple[ir.Value, int]], q: ir.Value, shapes: Shapes) -> float | None:
    """The product of the factors, or None for Attention's own ``D ** -0.5``."""
    number, power = 1.0, 0.0
    for value, sign in factors:
        n, p = _factor(value, q, shapes)
        number, power = number * n**sign, power + p * sign
    width = shapes.last(q)
    if abs(power) < 1e-9:
        return number
    if abs(power + 0.5) < 1e-9 and abs(number - 1) < 1e-6 and width is not None:
        return None
    raise NotRaisedError("its scale is another power of the head size than -1/2")


def _factor(value: ir.Value, q: ir.Value, shapes: Shapes) -> tuple[float, float]:
    """A one-element value as ``number * D ** power``."""
    if (number := graph.scalar(value)) is not None:
        return number, 0.0
    elements, width = shapes.elements(value), shapes.last(q)
    if elements is not None and elements[0].known is not None:
        return float(elements[0].number), 0.0
    if elements is not None and width is not None and elements[0] == width:
        return 1.0, 1.0
    node = value.producer()
    if node is not None and elements is None and node.inputs[0] is not None:
        n, p = _factor(node.inputs[0], q, shapes)
        if node.op_type == "Cast":
            return n, p
        if node.op_type == "Sqrt" and n >= 0:
            return n**0.5, p / 2
        if node.op_type == "Reciprocal" and n:
            return 1 / n, -p
        if node.op_type in ("Mul", "Div") and node.inputs[1] is not None:
            m, r = _factor(node.inputs[1], q, shapes)
            if node.op_type == "Mul":
                return n * m, p + r
            if m:
                return n / m, p - r
    raise NotRaisedError("its scale is computed from something else than the head size")
