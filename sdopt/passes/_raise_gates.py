"""Recognising SiLU and quick-GELU, which opset 23 has no operator for: Sigmoid and Mul."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_parts import (
    emitter,
    is_op,
    left,
    made,
    number,
    other,
    recast,
    replace,
    scale_of,
    tolerance_of,
    uncast,
)
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

QUICK = 1.702
"""``x * sigmoid(1.702 * x)``: Hendrycks and Gimpel, Gaussian Error Linear Units, section 2."""


def raise_sigmoid(node: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write ``x * Sigmoid(x)`` with its operands in that order, with and without 1.702.

    ``node`` is the Sigmoid. It has no operator in opset 23; the form is Sigmoid and Mul.
    """
    argument, gate = node.inputs[0], node.outputs[0]
    if argument is None:
        return False
    readings = dict(scale_of(argument))
    for user in list(gate.consumers()):
        x = other(user, gate) if is_op(user, "Mul") else None
        if x is None or x not in readings:
            continue
        factor = readings[x]
        kind, reason = _kind(factor, argument)
        if reason:
            return left(kind, reason, node, ctx)
        if user.inputs[0] is x and (factor == 1 or _is_plain(argument, x)):
            ctx.already(kind)
        elif factor == 1:
            user.replace_input_with(0, x)
            user.replace_input_with(1, gate)
            ctx.count(kind)
        else:
            _write(kind, x, user.outputs[0], shapes, ctx)
        return True
    wide = graph.single_consumer(recast(gate))
    x = other(wide, recast(gate)) if is_op(wide, "Mul") and wide is not None else None
    if x is not None and uncast(x, shapes) in dict(scale_of(uncast(argument, shapes))):
        return left("silu", "its Sigmoid runs in another precision than its Mul", node, ctx)
    return False


def _kind(factor: float, argument: ir.Value) -> tuple[str, str]:
    """The kind of ``x * sigmoid(factor * x)``, and what is wrong with the factor."""
    if factor == 1:
        return "silu", ""
    near = abs(factor - QUICK) <= tolerance_of(argument) * QUICK
    return "quick_gelu", "" if near else f"its factor is {factor:.4g}, not {QUICK}"


def _is_plain(argument: ir.Value, x: ir.Value) -> bool:
    """Whether ``argument`` is ``Mul(x, constant)``."""
    mul = graph.producer(argument, "Mul")
    return mul is not None and mul.inputs[0] is x and graph.scalar(mul.inputs[1]) is not None


def _write(kind: str, x: ir.Value, out: ir.Value, shapes: Shapes, ctx: PassContext) -> bool:
    dtype = shapes.dtype(x) or shapes.dtype(out)
    emit, argument = emitter(out, ctx), x
    if kind == "quick_gelu":
        if dtype is None:
            return left(kind, "its type is not known", made(out), ctx)
        argument = emit("Mul", x, emit.const(np.array(QUICK), dtype.numpy()))
        shapes.stands_for(argument, x)
    gate = emit("Sigmoid", argument)
    shapes.stands_for(gate, x)
    replace(out, emit("Mul", x, gate), shapes)
    ctx.count(kind)
    return True


def raise_logistic(node: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write ``x / (1 + exp(-x))``, or ``x`` times its reciprocal, with Sigmoid and Mul.

    ``node`` is the Exp.
    """
    add = graph.single_consumer(node.outputs[0])
    if not is_op(add, "Add") or add is None or node.inputs[0] is None:
        return False
    if number(other(add, node.outputs[0])) != 1:
        return False
    readings, below = dict(scale_of(node.inputs[0])), add.outputs[0]
    for user in list(below.consumers()):
        numerator = user.inputs[0] if is_op(user, "Div") and user.inputs[1] is below else None
        if numerator is not None and numerator in readings:
            return _raise_logistic(node, readings[numerator], numerator, user, shapes, ctx)
        if is_op(user, "Reciprocal") or (numerator is not None and number(numerator) == 1):
            gate = user.outputs[0]
            for product in list(gate.consumers()):
                x = other(product, gate) if is_op(product, "Mul") else None
                if x is not None and x in readings:
                    return _raise_logistic(node, readings[x], x, product, shapes, ctx)
    return False


def _raise_logistic(
    node: ir.Node, factor: float, x: ir.Value, end: ir.Node, shapes: Shapes, ctx: PassContext
) -> bool:
    assert node.inputs[0] is not None
    kind, reason = _kind(-factor, node.inputs[0])
    if reason:
        return left(kind, reason, node, ctx)
    return _write(kind, x, end.outputs[0], shapes, ctx)


def lower_swish(node: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write Swish, an operator of opset 24, in the form that passes know."""
    x, alpha = node.inputs[0], float(graph.attribute(node, "alpha", 1.0))
    if x is None:
        return False
    near = 1.0 if alpha == 1 else QUICK
    if abs(alpha - near) > 5e-6 * near:
        return left("quick_gelu", f"its factor is {alpha:.4g}, not {QUICK}", node, ctx)
    kind = "silu" if near == 1 else "quick_gelu"
    return _write(kind, x, node.outputs[0], shapes, ctx)
