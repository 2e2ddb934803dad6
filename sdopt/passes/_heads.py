"""The transposes that split attention operands into heads, and join them again."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sdopt import graph

SWAP = (0, 2, 1, 3)
"""``[B, S, heads, D]`` to ``[B, heads, S, D]`` and back."""


def before_split(value: ir.Value | None, width: int) -> ir.Value | None:
    """The ``[B, S, heads * D]`` value that this operand was split and transposed from."""
    transpose = graph.producer(value, "Transpose")
    if transpose is None or tuple(graph.attribute(transpose, "perm", ())) != SWAP:
        return None
    reshape = graph.producer(transpose.inputs[0], "Reshape")
    if reshape is None or rank(reshape.inputs[0]) != 3 or static(reshape.inputs[0], 2) != width:
        return None
    return reshape.inputs[0]


def joins(out: ir.Value, width: int) -> Sequence[ir.Node]:
    """The Reshapes to ``[B, S, heads * D]`` behind Transposes of ``out``."""
    found = []
    for transpose in out.consumers():
        if transpose.op_type != "Transpose":
            continue
        if tuple(graph.attribute(transpose, "perm", ())) == SWAP:
            found += [
                user
                for user in transpose.outputs[0].consumers()
                if user.op_type == "Reshape"
                and rank(user.outputs[0]) == 3
                and static(user.outputs[0], 2) == width
            ]
    return found


def is_dead_end(node: ir.Node) -> bool:
    """Whether nothing reads what ``node``, or the one Reshape behind it, makes."""
    return all(
        not value.is_graph_output() and all(is_dead_end(user) for user in value.consumers())
        for value in node.outputs
    )


def rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def static(value: ir.Value | None, axis: int) -> int | None:
    """The dimension ``axis`` of ``value`` if it is a number."""
    if value is None or value.shape is None:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None
