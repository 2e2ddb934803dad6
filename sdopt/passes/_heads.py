"""The layouts of attention operands: heads joined, after the tokens, or before them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_shapes import Shapes

SWAP = (0, 2, 1, 3)
"""``[B, S, heads, D]`` to ``[B, heads, S, D]`` and back."""


class Layout(enum.IntEnum):
    """Where the heads are; neighbours are one node apart."""

    FLAT = 0
    """``[B, S, heads * D]``"""
    LAST = 1
    """``[B, S, heads, D]``"""
    FIRST = 2
    """``[B, heads, S, D]``"""


@dataclass(frozen=True)
class Heads:
    """A value with heads: how it lies, how many there are and of which size."""

    value: ir.Value
    layout: Layout
    count: int
    size: int

    def to(self, layout: Layout, emit: graph.Emitter, shapes: Shapes) -> ir.Value:
        """The value in another layout: where it came from if that is it, else by new nodes."""
        value, now = self.value, self.layout
        while now > layout:
            value = _undone(value, now, self, shapes) or _joined(value, now, self, emit)
            now = Layout(now - 1)
        while now < layout:
            value = _split(value, now, self, emit)
            now = Layout(now + 1)
        return value

    def made_from(self, layout: Layout, shapes: Shapes) -> ir.Value | None:
        """The value in an earlier layout, if it was made from one in that layout."""
        value: ir.Value | None = self.value
        for now in range(self.layout, layout, -1):
            value = _undone(value, Layout(now), self, shapes) if value is not None else None
        return value

    def replace_by(
        self, new: ir.Value, layout: Layout, emit: graph.Emitter, shapes: Shapes
    ) -> list[ir.Node]:
        """Let readers of this value read ``new``, which is the same in another layout.

        Readers that bring this value into that layout are bypassed and returned: they are dead.
        """
        dead: list[ir.Node] = []
        if layout < self.layout:
            dead = list(_readers_in(layout, self.value, self, shapes))
            for reader in dead:
                out = reader.outputs[0]
                shape, dtype = new.shape, new.type
                shapes.stands_for(new, out)
                new.shape, new.type = new.shape or shape, new.type or dtype
                graph.replace_uses(out, new)
        if self.value.is_graph_output() or not all(map(_is_unread, self.value.consumers())):
            same = Heads(new, layout, self.count, self.size).to(self.layout, emit, shapes)
            same.type, same.shape = self.value.type, self.value.shape
            graph.replace_uses(self.value, same)
        return dead


def _undone(value: ir.Value, now: Layout, heads: Heads, shapes: Shapes) -> ir.Value | None:
    """What the node behind ``value`` made the layout ``now`` of, if it lies one before."""
    if now == Layout.FIRST:
        transpose = graph.producer(value, "Transpose")
        if transpose is None or tuple(graph.attribute(transpose, "perm", ())) != SWAP:
            return None
        return transpose.inputs[0]
    reshape = graph.producer(value, "Reshape")
    if reshape is None or not _joins(value, reshape.inputs[0], heads, shapes):
        return None
    return reshape.inputs[0]


def _joins(apart: ir.Value, flat: ir.Value | None, heads: Heads, shapes: Shapes) -> bool:
    """Whether ``[B, S, heads, D]`` and ``[B, S, heads * D]`` are known to be of one ``B, S``."""
    a, b = shapes.dims(apart), shapes.dims(flat)
    if a is None or b is None or len(a) != 4 or len(b) != 3:
        return False
    return b[2].known == heads.count * heads.size and list(a[:2]) == list(b[:2])


def _joined(value: ir.Value, now: Layout, heads: Heads, emit: graph.Emitter) -> ir.Value:
    if now == Layout.FIRST:
        return _typed(emit("Transpose", value, perm=list(SWAP)), value, SWAP)
    flat = emit("Reshape", value, emit.const([0, 0, heads.count * heads.size]))
    if value.shape is not None:
        flat.shape = ir.Shape([*value.shape[:2], heads.count * heads.size])
    flat.type = value.type
    return flat


def _split(value: ir.Value, now: Layout, heads: Heads, emit: graph.Emitter) -> ir.Value:
    if now == Layout.LAST:
        return _typed(emit("Transpose", value, perm=list(SWAP)), value, SWAP)
    apart = emit("Reshape", value, emit.const([0, 0, heads.count, heads.size]))
    if value.shape is not None:
        apart.shape = ir.Shape([*value.shape[:2], heads.count, heads.size])
    apart.type = value.type
    return apart


def _typed(new: ir.Value, like: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    new.type = like.type
    if like.shape is not None:
        new.shape = ir.Shape([like.shape[axis] for axis in perm])
    return new


def _readers_in(layout: Layout, value: ir.Value, heads: Heads, shapes: Shapes) -> list[ir.Node]:
    """The nodes that turn ``value``, of the heads' own layout, into ``layout``."""
    found = [(value, heads.layout)]
    nodes: list[ir.Node] = []
    while found:
        one, now = found.pop()
        for user in one.consumers():
            out = user.outputs[0]
            if now == Layout.FIRST and user.op_type == "Transpose" and not user.domain:
                fits = tuple(graph.attribute(user, "perm", ())) == SWAP
            elif now == Layout.LAST and user.op_type == "Reshape" and not user.domain:
                fits = user.inputs[0] is one and _joins(one, out, heads, shapes)
            else:
                fits = False
            if fits and now - 1 == layout:
                nodes.append(user)
            elif fits:
                found.append((out, Layout(now - 1)))
    return nodes


def _is_unread(node: ir.Node, depth: int = 2) -> bool:
    """Whether nothing reads what ``node``, or the Reshape behind a Transpose, makes."""
    if node.op_type not in ("Transpose", "Reshape") or node.outputs[0].is_graph_output():
        return False
    return depth > 0 and all(_is_unread(user, depth - 1) for user in node.outputs[0].consumers())
