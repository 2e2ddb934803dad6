"""The skip connections of a U-Net, by structure."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._self_attention import levels_of


@dataclass(frozen=True)
class SkipConnection:
    """A Concat of what comes from below with a map from the way down.

    Attributes:
        concat: the node.
        below: its input that was computed from the other one.
        level: how often the latent was halved before the other one.
    """

    concat: ir.Node
    below: ir.Value
    level: int


def find(main: ir.Graph) -> list[SkipConnection]:
    """Every Concat of two feature maps of which one is computed from the other, in graph order."""
    found = []
    levels = levels_of(main)
    for node in main:
        if node.op_type != "Concat" or len(node.inputs) != 2:
            continue
        first, second = node.inputs
        if first is None or second is None or first not in levels or second not in levels:
            continue
        if graph.attribute(node, "axis") not in (1, -3):
            continue
        for below, beside in ((first, second), (second, first)):
            if depends_on(below, without_residual(beside)):
                found.append(SkipConnection(node, below, levels[beside]))
    return found


def without_residual(value: ir.Value) -> ir.Value:
    """The map from the way down that a ControlNet's residual, an input, is added to; or itself."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return value
    own = [one for one in node.inputs if one is not None and not one.is_graph_input()]
    return own[0] if len(own) == 1 else value


def depends_on(value: ir.Value, other: ir.Value) -> bool:
    """Whether ``value`` is computed from ``other``."""
    stack, seen = [value], {value}
    while stack:
        node = stack.pop().producer()
        for feed in node.inputs if node is not None else ():
            if feed is other:
                return True
            if feed is not None and feed not in seen:
                seen.add(feed)
                stack.append(feed)
    return False


def output_of(main: ir.Graph, path: str) -> ir.Value | str:
    """The one value that leaves a module, or why there is not one."""
    inside = {node for node in main if graph.in_module(graph.module_path(node), path)}
    leaving = [
        value
        for node in inside
        for value in node.outputs
        if any(user not in inside for user in value.consumers())
    ]
    if not inside:
        return f"cut={path} names no module of this graph"
    return leaving[0] if len(leaving) == 1 else f"{len(leaving)} values leave the module {path}"


def needed_beside(main: ir.Graph, feature: ir.Value) -> list[ir.Node]:
    """What the outputs need beside ``feature``, in graph order, if that is given."""
    stack, needed = [v.producer() for v in main.outputs], set()
    while stack:
        node = stack.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        stack += [v.producer() for v in node.inputs if v is not None and v is not feature]
    return [node for node in main if node in needed]
