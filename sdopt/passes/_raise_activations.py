"""Recognising GELU, exact or with tanh, in any order of its multiplications."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_parts import (
    emitter,
    is_op,
    left,
    number,
    recast,
    replace,
    scale_of,
    tolerance_of,
    uncast,
)
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

Polynomial = dict[int, float]
"""Power to coefficient."""

_ERF: Polynomial = {1: 2**-0.5}
_TANH: Polynomial = {1: (2 / np.pi) ** 0.5, 3: 0.044715 * (2 / np.pi) ** 0.5}


def raise_gelu(node: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write ``0.5 * x * (1 + erf(x / sqrt(2)))``, or the same with tanh, as one Gelu.

    ``node`` is the Erf or Tanh, which may run in another precision between two Casts.
    """
    add = graph.single_consumer(recast(node.outputs[0]))
    if not is_op(add, "Add") or add is None or 1.0 not in map(number, add.inputs):
        return False
    if node.inputs[0] is None:
        return False
    argument = uncast(node.inputs[0], shapes)
    wanted, tolerance = _ERF if node.op_type == "Erf" else _TANH, tolerance_of(argument)
    seen = False
    for x, factor, out in _products(add.outputs[0]):
        if x is None:
            continue
        seen = True
        found = _polynomial(argument, x)
        if found is None or not _close({0: factor}, {0: 0.5}, tolerance):
            continue
        if _close(found, wanted, tolerance):
            extra = {} if node.op_type == "Erf" else {"approximate": "tanh"}
            replace(out, emitter(out, ctx)("Gelu", x, **extra), shapes)
            ctx.count("gelu")
            return True
    if seen:
        return left(
            "gelu", f"{node.op_type} is used like a GELU's, with other constants", node, ctx
        )
    return False


def _products(one: ir.Value) -> Iterator[tuple[ir.Value | None, float, ir.Value]]:
    """What ``one`` is multiplied with: an x, a number and the product, step by step.

    An x that is itself a scaled value is offered in both readings.
    """
    readings: list[tuple[ir.Value | None, float]] = [(None, 1.0)]
    value = one
    while True:
        user = graph.single_consumer(value)
        if user is None or user.op_type not in ("Mul", "Div"):
            return
        other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
        if other is None or other is value or (user.op_type == "Div" and other is user.inputs[0]):
            return
        scale = number(other)
        if scale is not None:
            factor = scale if user.op_type == "Mul" else 1 / scale if scale else 0.0
            readings = [(x, so_far * factor) for x, so_far in readings]
        elif user.op_type == "Div" or any(x is not None for x, _ in readings):
            return
        else:
            readings = [(x, so_far * n) for _, so_far in readings for x, n in scale_of(other)]
        value = user.outputs[0]
        yield from ((x, so_far, value) for x, so_far in readings)


def _polynomial(value: ir.Value, x: ir.Value, depth: int = 8) -> Polynomial | None:
    """``value`` as a polynomial in ``x``."""
    if value is x:
        return {1: 1.0}
    if (known := number(value)) is not None:
        return {0: known}
    node = value.producer()
    if node is None or node.domain or depth == 0 or len(node.inputs) != 2:
        return None
    sides = [_polynomial(side, x, depth - 1) if side is not None else None for side in node.inputs]
    a, b = sides
    if a is None or b is None:
        return None
    if node.op_type == "Add":
        return {power: a.get(power, 0) + b.get(power, 0) for power in a | b}
    if node.op_type == "Mul":
        return _multiplied(a, b)
    if set(b) != {0}:
        return None
    if node.op_type == "Div" and b[0]:
        return {power: factor / b[0] for power, factor in a.items()}
    if node.op_type == "Pow" and b[0] in (2, 3):
        square = _multiplied(a, a)
        return square if b[0] == 2 else _multiplied(square, a)
    return None


def _multiplied(a: Polynomial, b: Polynomial) -> Polynomial:
    out: Polynomial = {}
    for p, m in a.items():
        for q, n in b.items():
            out[p + q] = out.get(p + q, 0.0) + m * n
    return out


def _close(found: Polynomial, wanted: Polynomial, tolerance: float) -> bool:
    return set(found) == set(wanted) and all(
        abs(found[power] - wanted[power]) <= tolerance * abs(wanted[power]) for power in wanted
    )
