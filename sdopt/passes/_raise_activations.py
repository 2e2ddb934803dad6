"""Recognising GELU, exact or with tanh, in any order of its multiplications."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

Polynomial = dict[int, float]
"""Power to coefficient."""

_ERF: Polynomial = {1: 2**-0.5}
_TANH: Polynomial = {1: (2 / np.pi) ** 0.5, 3: 0.044715 * (2 / np.pi) ** 0.5}
_EXACT, _HALF = 5e-6, 1e-3
"""How far constants may be off: printed to 6 digits, or rounded to half precision."""


def raise_gelu(node: ir.Node, shapes: Shapes, ctx: PassContext) -> bool:
    """Write ``0.5 * x * (1 + erf(x / sqrt(2)))``, or the same with tanh, as one Gelu.

    ``node`` is the Erf or Tanh.
    """
    add = graph.single_consumer(node.outputs[0])
    if add is None or add.op_type != "Add" or 1.0 not in map(graph.scalar, add.inputs):
        return False
    argument, wanted = node.inputs[0], _ERF if node.op_type == "Erf" else _TANH
    assert argument is not None
    seen = False
    for x, number, out in _products(add.outputs[0]):
        if x is None:
            continue
        seen = True
        found = _polynomial(argument, x)
        tolerance = _HALF if _is_half(argument) else _EXACT
        if found is None or not _close({0: number}, {0: 0.5}, tolerance):
            continue
        if _close(found, wanted, tolerance):
            emit = ctx.emitter(_made(out), f"{graph.module_path(node)}/raise_ops")
            extra = {} if node.op_type == "Erf" else {"approximate": "tanh"}
            new = emit("Gelu", x, **extra)
            shapes.stands_for(new, out)
            old = _made(out)
            graph.replace_uses(out, new)
            graph.remove_dead([old])
            ctx.count("gelu")
            return True
    if seen:
        ctx.skip(f"{node.op_type} is used like a GELU's, with other constants", node)
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
        scale = graph.scalar(other)
        if scale is not None:
            factor = scale if user.op_type == "Mul" else 1 / scale if scale else 0.0
            readings = [(x, number * factor) for x, number in readings]
        elif user.op_type == "Div" or any(x is not None for x, _ in readings):
            return
        else:
            readings = [(x, number * n) for _, number in readings for x, n in _scaled(other)]
        value = user.outputs[0]
        yield from ((x, number, value) for x, number in readings)


def _scaled(value: ir.Value) -> Iterator[tuple[ir.Value, float]]:
    """``value`` as itself, and as a number times what it was scaled from."""
    yield value, 1.0
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div") or node.domain:
        return
    sides = [(node.inputs[0], node.inputs[1])]
    if node.op_type == "Mul":
        sides.append((node.inputs[1], node.inputs[0]))
    for x, other in sides:
        number = graph.scalar(other)
        if x is not None and number:
            yield x, number if node.op_type == "Mul" else 1 / number


def _polynomial(value: ir.Value, x: ir.Value, depth: int = 8) -> Polynomial | None:
    """``value`` as a polynomial in ``x``."""
    if value is x:
        return {1: 1.0}
    if (number := graph.scalar(value)) is not None:
        return {0: number}
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
        return {power: number / b[0] for power, number in a.items()}
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


def _is_half(value: ir.Value) -> bool:
    """Whether the constants behind ``value`` are of half precision."""
    stack = [value]
    for _ in range(16):
        if not stack:
            break
        one = stack.pop()
        array = graph.constant(one, most=1)
        if array is not None:
            return array.dtype.itemsize == 2
        node = one.producer()
        if node is not None and node.op_type in ("Mul", "Div", "Add", "Pow"):
            stack.extend(side for side in node.inputs[::-1] if side is not None)
    return False


def _made(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
