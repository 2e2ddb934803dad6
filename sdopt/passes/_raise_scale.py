"""The scale of a written-out attention: what its scores are multiplied with, as one number."""

from __future__ import annotations

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import Dim
from sdopt.passes._raise_shapes import Shapes

Factor = tuple[ir.Value, int]
"""A one-element value, and 1 where it multiplies or -1 where it divides."""


class NotRaisedError(Exception):
    """Something written out that cannot be one node; the text says why."""


def scaled(node: ir.Node, shapes: Shapes) -> tuple[ir.Value, ir.Value, int] | None:
    """What a Mul or Div scales, by which one-element value, and 1 or -1; None if it does not."""
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    a, b = node.inputs
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
        if node.op_type in ("Mul", "Div", "Pow"):
            return all(side is not None and _is_scalar(side, shapes) for side in node.inputs)
        if (
            node.op_type not in ("Sqrt", "Cast", "CastLike", "Reciprocal")
            or node.inputs[0] is None
        ):
            return False
        value = node.inputs[0]
    return False


def scale(factors: list[Factor], width: Dim | None, shapes: Shapes) -> float | None:
    """The product of the factors, or None for Attention's own ``D ** -0.5``; D is ``width``.

    Raises:
        NotRaisedError: it is another power of an unknown D, not a number, or not above 0 (the
            square root of Attention's scale goes to q and to k).
    """
    number, power = 1.0, 0.0
    for value, sign in factors:
        n, p = _factor(value, width, shapes)
        if n == 0 and sign < 0:
            raise NotRaisedError("its scores are divided by 0")
        number, power = number * n**sign, power + p * sign
    known = width.known if width is not None else None
    if power and known:
        number, power = number * known**power, 0.0
    if known and abs(number * known**0.5 - 1) < 1e-6 and not power:
        return None
    if abs(power) < 1e-9:
        if not number > 0:
            raise NotRaisedError("its scale is not above 0, as Attention's has to be")
        return number
    if abs(power + 0.5) < 1e-9 and abs(number - 1) < 1e-6 and width is not None:
        return None
    raise NotRaisedError("its scale is another power of the head size than -1/2")


def _factor(value: ir.Value, width: Dim | None, shapes: Shapes) -> tuple[float, float]:
    """A one-element value as ``number * D ** power``."""
    if (number := graph.scalar(value)) is not None:
        return number, 0.0
    elements = shapes.elements(value)
    if elements is not None and elements[0].known is not None:
        return float(elements[0].number), 0.0
    if elements is not None and width is not None and elements[0] == width:
        return 1.0, 1.0
    node = value.producer()
    if node is not None and elements is None and node.inputs and node.inputs[0] is not None:
        n, p = _factor(node.inputs[0], width, shapes)
        if node.op_type in ("Cast", "CastLike"):
            return n, p
        if node.op_type == "Sqrt" and n >= 0:
            return n**0.5, p / 2
        if node.op_type == "Reciprocal" and n:
            return 1 / n, -p
        if node.op_type == "Pow" and n > 0 and node.inputs[1] is not None:
            exponent = graph.scalar(node.inputs[1])
            if exponent is not None:
                return n**exponent, p * exponent
        if node.op_type in ("Mul", "Div") and node.inputs[1] is not None:
            m, r = _factor(node.inputs[1], width, shapes)
            if node.op_type == "Mul":
                return n * m, p + r
            if m:
                return n / m, p - r
    raise NotRaisedError("its scale is computed from something else than the head size")
