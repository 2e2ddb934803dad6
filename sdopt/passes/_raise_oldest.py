"""Operators of opset 9 and 10 as opset 11 spells them, where most signatures of today began."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_shapes import Shapes

FIRST = 11
"""The opset whose spelling the rules write."""

SAME = frozenset({"AveragePool", "Compress", "NonMaxSuppression", "OneHot"})
"""Changed in opset 10 or 11 by an option that is off by default, or by negative axes, no more."""

_NEW_WORDS = {"Upsample": "Resize", "Scatter": "ScatterElements"}


def refusal(node: ir.Node) -> str | None:
    """Why a node of opset 9 or 10 cannot be written in opset 11, or None."""
    name = node.op_type
    if name == "Resize" and graph.attribute(node, "mode", "nearest") == "nearest":
        scales = graph.constant(node.inputs[1])
        if scales is None or (scales < 1).any():
            return "a Resize to the nearest of opset 10 may shrink, and does not say how it rounds"
    if name == "Dropout" and len(node.outputs) > 1:
        return "a Dropout has a mask, whose type opset 10 changed"
    if name == "ConvTranspose" and graph.attribute(node, "auto_pad", "") in (
        "SAME_UPPER",
        "SAME_LOWER",
    ):
        return "a ConvTranspose pads by itself, which opset 11 defines anew"
    return None


def rewrite(node: ir.Node, emit: Callable[[], graph.Emitter], shapes: Shapes) -> None:
    """Write one node, which ``refusal`` let pass, as opset 11 does; in place."""
    if (rule := _RULES.get(node.op_type)) is not None:
        rule(node, emit(), shapes)
        node.op_type = _NEW_WORDS.get(node.op_type, node.op_type)


def _slice(node: ir.Node, emit: graph.Emitter, _: Shapes) -> None:
    """Attributes until opset 9."""
    if "starts" in node.attributes:
        words = ("starts", "ends", "axes")
        bounds = [graph.attribute(node, word) for word in words]
        _take(node, words)
        _append(node, [emit.const(list(one)) if one is not None else None for one in bounds])


def _resize(node: ir.Node, _: graph.Emitter, __: Shapes) -> None:
    """Upsample, and Resize until opset 10: corners at zero, the nearest rounded down."""
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    mode = graph.attribute(node, "mode", "nearest")
    words = {"coordinate_transformation_mode": "asymmetric", "mode": mode}
    if mode == "nearest":
        words["nearest_mode"] = "floor"
    for word, value in words.items():
        node.attributes[word] = ir.AttrString(word, value)


def _clip(node: ir.Node, emit: graph.Emitter, shapes: Shapes) -> None:
    """Bounds as attributes until opset 10; one that is not there is the type's own."""
    words = ("min", "max")
    bounds = [graph.attribute(node, word) for word in words]
    _take(node, words)
    given = [None if one is None else _number(one, node.inputs[0], emit, shapes) for one in bounds]
    _append(node, given)


def _pad(node: ir.Node, emit: graph.Emitter, shapes: Shapes) -> None:
    """Amounts and value as attributes until opset 10."""
    pads, value = graph.attribute(node, "pads"), graph.attribute(node, "value", 0.0)
    _take(node, ("pads", "value"))
    filling = _number(value, node.inputs[0], emit, shapes) if value else None
    _append(node, [emit.const(list(pads)), filling])


def _top_k(node: ir.Node, emit: graph.Emitter, _: Shapes) -> None:
    """The count as an attribute in opset 9."""
    count = graph.attribute(node, "k")
    if count is not None:
        _take(node, ("k",))
        _append(node, [emit.const([count])])


def _scatter(_: ir.Node, __: graph.Emitter, ___: Shapes) -> None:
    """Another word, the same meaning."""


_RULES: dict[str, Callable[[ir.Node, graph.Emitter, Shapes], None]] = {
    "Slice": _slice,
    "Upsample": _resize,
    "Resize": _resize,
    "Clip": _clip,
    "Pad": _pad,
    "TopK": _top_k,
    "Scatter": _scatter,
}

KNOWN = SAME | frozenset(_RULES)
"""Operators that need nothing more than this module to be of opset 11."""


def _number(number: float, like: ir.Value | None, emit: graph.Emitter, shapes: Shapes) -> ir.Value:
    """A scalar of the element type of ``like``, asked of the graph where it is not known."""
    dtype = shapes.dtype(like)
    if dtype is not None:
        return emit.const(number, dtype.numpy())
    return emit("CastLike", emit.const(number, np.float32), like)


def _take(node: ir.Node, words: tuple[str, ...]) -> None:
    for word in words:
        node.attributes.pop(word, None)


def _append(node: ir.Node, values: list[ir.Value | None]) -> None:
    """Put values behind the node's first input, without those missing at the end."""
    while values and values[-1] is None:
        values.pop()
    node.resize_inputs(1 + len(values))
    for index, value in enumerate(values, 1):
        node.replace_input_with(index, value)
