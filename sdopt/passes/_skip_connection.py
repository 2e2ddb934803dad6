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
            if depends_on(below, beside):
                found.append(SkipConnection(node, below, levels[beside]))
    return found


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
