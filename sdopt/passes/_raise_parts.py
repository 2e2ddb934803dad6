"""Steps that the recognition of norms and of activations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
FLOATS = HALF | {ir.DataType.FLOAT}
"""The types that the canonical norms compute in float32 (``stash_type`` 1), or are float32."""

_EXACT, _HALF = 5e-6, 1e-3

_CAST = FLOATS | {ir.DataType.DOUBLE}
"""torch's older exporter squares half precision in float64 below opset 17."""

_MOST = 16384
"""Parameters up to this many elements are looked at to see whether they are all ones or zeros."""


@dataclass
class Affine:
    """``out = y * gamma + beta``; where there is neither, ``out`` is y."""

    out: ir.Value
    gamma: ir.Value | None = None
    beta: ir.Value | None = None


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether ``node`` is one of those operators of the standard domain."""
    return node is not None and node.op_type in names and node.domain in ("", "ai.onnx")


def made(value: ir.Value) -> ir.Node:
    """The node that makes ``value``, which is known to be made by one."""
    node = value.producer()
    if node is None:
        raise TypeError(f"{value.name} is not made by a node")
    return node


def other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary ``node`` that is not ``value``; None for ``value`` with itself."""
    sides = [side for side in node.inputs if side is not value]
    return sides[0] if len(sides) == 1 and len(node.inputs) == 2 else None


def emitter(value: ir.Value, ctx: PassContext) -> graph.Emitter:
    """Inserts before the node that makes ``value``."""
    node = made(value)
    return ctx.emitter(node, f"{graph.module_path(node)}/raise_ops")


def replace(old: ir.Value, new: ir.Value, shapes: Shapes) -> None:
    """Let ``new`` take the place of ``old``, and remove what only ``old`` needed."""
    shapes.stands_for(new, old)
    node = made(old)
    graph.replace_uses(old, new)
    graph.remove_dead([node])


def left(kind: str, reason: str, node: ir.Node, ctx: PassContext) -> bool:
    """Say why a place is left alone; False, so that it can be returned."""
    ctx.skip(reason, node, kind=kind)
    return False


def number(value: ir.Value | None, depth: int = 6) -> float | None:
    """The number in a one-element value that is a constant, or made of constants only."""
    if (known := graph.scalar(value)) is not None:
        return known
    node = value.producer() if value is not None else None
    if node is None or depth == 0 or (rule := _ARITHMETIC.get(node.op_type)) is None:
        return None
    if node.domain not in ("", "ai.onnx"):
        return None
    sides = [number(side, depth - 1) for side in node.inputs]
    numbers = [side for side in sides if side is not None]
    if len(numbers) != len(sides):
        return None
    try:
        result = rule(*numbers)
    except (ArithmeticError, ValueError):  # a root of less than 0, a power too large
        return None
    return None if isinstance(result, complex) else float(result)


def scale_of(value: ir.Value) -> Iterator[tuple[ir.Value, float]]:
    """``value`` as itself, and as a number times what it was scaled from, step by step."""
    yield value, 1.0
    node = value.producer()
    if is_op(node, "Neg") and node is not None and node.inputs[0] is not None:
        yield from ((x, -factor) for x, factor in scale_of(node.inputs[0]))
    if not is_op(node, "Mul", "Div") or node is None:
        return
    sides = [(node.inputs[0], node.inputs[1])]
    if node.op_type == "Mul":
        sides.append((node.inputs[1], node.inputs[0]))
    for x, by in sides:
        scale = number(by)
        if x is not None and scale:
            scale = scale if node.op_type == "Mul" else 1 / scale
            yield from ((source, scale * factor) for source, factor in scale_of(x))
            return


def tolerance_of(value: ir.Value) -> float:
    """How far a constant behind ``value`` may be off: printed to 6 digits, or rounded to half."""
    stack = [value]
    for _ in range(16):
        if not stack:
            break
        one = stack.pop()
        array = graph.constant(one, most=1)
        if array is not None:
            return _HALF if array.dtype.itemsize == 2 else _EXACT
        node = one.producer()
        if is_op(node, "Mul", "Div", "Add", "Pow", "Cast") and node is not None:
            stack.extend(side for side in node.inputs[::-1] if side is not None)
    return _EXACT


_ARITHMETIC: dict[str, Callable[..., float | complex]] = {
    "Add": lambda a, b: a + b,
    "Cast": lambda a: a,
    "Div": lambda a, b: a / b,
    "Identity": lambda a: a,
    "Mul": lambda a, b: a * b,
    "Pow": lambda a, b: a**b,
    "Reciprocal": lambda a: 1 / a,
    "Sqrt": math.sqrt,
    "Sub": lambda a, b: a - b,
}


def refusal(
    raw: ir.DataType | None, core: ir.DataType | None, out: ir.DataType | None
) -> str | None:
    """Why a norm of ``raw``, computed in ``core``, may not become one that makes ``out``.

    The canonical norms compute in float32, so that half precision in between would be lost
    knowingly, and float64 unless what goes in and out is of half precision.
    """
    if out is None or out not in FLOATS:
        return f"its type is {out or 'not known'}, not a float up to 32 bits"
    if raw == ir.DataType.FLOAT and (core in HALF or out in HALF):
        return "it narrows float32 to half precision on the way"
    if core == ir.DataType.DOUBLE and out not in HALF:
        return "it computes in float64 on the way"
    return None


def uncast(value: ir.Value, shapes: Shapes) -> ir.Value:
    """``value`` before the Casts from one float type to another."""
    while (node := graph.producer(value, "Cast")) is not None and node.inputs[0] is not None:
        if shapes.dtype(node.inputs[0]) not in _CAST or _target(node) not in _CAST:
            break
        value = node.inputs[0]
    return value


def recast(value: ir.Value) -> ir.Value:
    """``value`` behind the Casts to float types that are all that reads it."""
    while is_op(user := graph.single_consumer(value), "Cast") and user is not None:
        if _target(user) not in _CAST:
            break
        value = user.outputs[0]
    return value


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(graph.attribute(cast, "to"))


def affine(y: ir.Value, fits: Callable[[ir.Value, float], bool], *, shifts: bool = True) -> Affine:
    """The Mul by a parameter and the Add of one behind ``y``, as far as the parameters fit.

    ``fits`` is given a parameter, and 1 for a factor or 0 for a summand.
    """
    found = Affine(y)
    user = graph.single_consumer(y)
    if is_op(user, "Mul") and user is not None:
        gamma = other(user, y)
        if gamma is None or not fits(gamma, 1.0):
            return found
        found = Affine(user.outputs[0], gamma)
        user = graph.single_consumer(found.out)
    if shifts and is_op(user, "Add") and user is not None:
        beta = other(user, found.out)
        if beta is not None and fits(beta, 0.0):
            return Affine(user.outputs[0], found.gamma, beta)
    return found


def is_filled(value: ir.Value | None, number: float) -> bool:
    """Whether a constant holds nothing but ``number``."""
    array = graph.constant(value, most=_MOST)
    return array is not None and bool(np.all(array == number))


def parameter(
    value: ir.Value | None,
    dims: Sequence[int],
    default: float,
    dtype: ir.DataType,
    shapes: Shapes,
    emit: graph.Emitter,
) -> ir.Value:
    """A scale or bias with exactly ``dims``: what a norm is given, or ``default`` throughout.

    A parameter is never read; one that a file holds stays that range of the file.
    """
    name = "scale" if default else "bias"
    if value is not None and shapes.dtype(value) not in (dtype, None):
        value = uncast(value, shapes)
    if value is None or graph.scalar(value) == default:
        return emit.weight(weights.full(dims, default, dtype), name)
    if _sizes(value, shapes) == list(dims):
        return value
    node = value.producer()
    if is_op(node, "Unsqueeze", "Reshape") and node is not None:
        source = node.inputs[0]
        if source is not None and _sizes(source, shapes) == list(dims):
            return source
    if value.const_value is not None and not value.is_graph_input():
        return emit.weight(weights.reshaped(value.const_value, dims), name)
    return emit("Reshape", value, emit.const(list(dims)))


def _sizes(value: ir.Value, shapes: Shapes) -> list[int | None]:
    return [dim.known for dim in shapes.dims(value) or ()]


def narrowed(
    found: Affine, raw: ir.Value, shapes: Shapes
) -> tuple[ir.Value, ir.Value | None] | None:
    """The Cast behind an affine step in float32 that brings it back to the type of ``raw``.

    Returns the value of that Cast and ``raw``, if the parameters were cast from that type, too.
    """
    end = recast(found.out)
    dtype = shapes.dtype(raw)
    parameters = [one for one in (found.gamma, found.beta) if one is not None]
    if end is found.out or dtype is None or _target(made(end)) != dtype:
        return None
    if any(
        graph.scalar(p) is None and shapes.dtype(uncast(p, shapes)) != dtype for p in parameters
    ):
        return None
    return end, raw
