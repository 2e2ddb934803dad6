"""Carrying channels-last values through a graph whose operators are written channels-first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import PassContext

TO_LAST = (0, 2, 3, 1)
"""``[B, C, H, W]`` to ``[B, H, W, C]``: axis i of the result is this axis of the source."""
TO_FIRST = (0, 3, 1, 2)
"""``[B, H, W, C]`` to ``[B, C, H, W]``."""

_UNARY = frozenset(
    {"Abs", "Cast", "Clip", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"}
    | {"LeakyRelu", "Mish", "Neg", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"}
)
_BINARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"})

Rule = Callable[[ir.Node], bool]


class Layout:
    """The values that also exist channels-last, and the rules that carry them on.

    A rule writes its node again on channels-last operands and leaves a Transpose back for readers
    that no rule knows; ``finish`` removes those that nobody reads.
    """

    def __init__(self, ctx: PassContext, label: str) -> None:
        self._ctx, self._label = ctx, label
        self._last: dict[ir.Value, ir.Value] = {}
        self._backs: list[ir.Node] = []
        self._rules: dict[str, Rule] = {
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_BINARY, self._binary),
            "Concat": self._concat,
            "Resize": self._resize,
            "Shape": self._shape,
            "Pad": self._pad,
            "Transpose": self._transpose,
        }

    def emitter(self, node: ir.Node) -> graph.Emitter:
        """Nodes in front of ``node``, named after its module."""
        return self._ctx.emitter(node, f"{graph.module_path(node)}/{self._label}")

    def last(self, value: ir.Value, emit: graph.Emitter) -> ir.Value:
        """``value`` channels-last: the one there is, or a Transpose."""
        if value not in self._last:
            made = emit("Transpose", value, perm=list(TO_LAST))
            made.type, made.shape = value.type, _permuted(value.shape, TO_LAST)
            self._last[value] = made
        return self._last[value]

    def has(self, value: ir.Value | None) -> bool:
        """Whether a channels-last form of ``value`` exists already."""
        return value is not None and value in self._last

    def carry(self, node: ir.Node) -> bool:
        """Write a node that is neutral to layout on channels-last operands, if any are there."""
        rule = self._rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        return rule is not None and any(map(self.has, node.inputs)) and rule(node)

    def replace(self, old: ir.Value, made: ir.Value, emit: graph.Emitter) -> None:
        """Let ``made`` be the channels-last form of ``old``, whose node goes."""
        node = old.producer()
        made.type, made.shape = old.type, _permuted(old.shape, TO_LAST)
        back = emit("Transpose", made, perm=list(TO_FIRST))
        back.type, back.shape = old.type, old.shape
        graph.replace_uses(old, back)
        self._last[back] = made
        if (transpose := back.producer()) is not None:
            self._backs.append(transpose)
        if node is not None:
            graph.remove_dead([node])

    def finish(self) -> int:
        """Remove the Transposes that nobody reads; how many are left between the layouts."""
        graph.remove_dead(reversed(self._backs))
        return sum(node.graph is not None for node in self._backs)

    def _again(
        self,
        node: ir.Node,
        inputs: Sequence[ir.Value | None],
        emit: graph.Emitter,
        **attributes: object,
    ) -> bool:
        kept = {name: attr.value for name, attr in node.attributes.items()}
        self.replace(node.outputs[0], emit(node.op_type, *inputs, **{**kept, **attributes}), emit)
        return True

    def _unary(self, node: ir.Node) -> bool:
        emit = self.emitter(node)
        first = node.inputs[0]
        assert first is not None
        return self._again(node, [self.last(first, emit), *node.inputs[1:]], emit)

    def _binary(self, node: ir.Node) -> bool:
        emit, operands = self.emitter(node), []
        if len(node.inputs) != 2 or graph.rank(node.outputs[0]) != 4:
            return False
        kinds = [self._kind(value) for value in node.inputs]
        if None in kinds:
            return False
        for value, kind in zip(node.inputs, kinds, strict=True):
            assert value is not None
            operands.append(self._operand(value, kind, emit))
        return self._again(node, operands, emit)

    def _operand(self, value: ir.Value, kind: str | None, emit: graph.Emitter) -> ir.Value:
        if kind == "image":
            return self.last(value, emit)
        if kind == "number":
            return value
        target = [0, 1, 1, -1] if kind == "channels of each" else [-1]
        made = emit("Reshape", value, emit.const(target))
        made.type = value.type
        if kind == "channels of each" and value.shape is not None:
            made.shape = ir.Shape([value.shape[0], 1, 1, value.shape[1]])
        return made

    def _kind(self, value: ir.Value | None) -> str | None:
        """How an operand broadcasts against ``[B, C, H, W]``; None if that is not known."""
        if self.has(value):
            return "image"
        if value is None:
            return None
        shape = value.shape or (value.const_value.shape if value.const_value is not None else None)
        if shape is None:
            return None
        sizes = [dim if isinstance(dim, int) else None for dim in shape]
        if all(size == 1 for size in sizes):
            return "number" if len(sizes) < 2 else None
        if len(sizes) == 4 and sizes[2:] == [1, 1] and sizes[1] is not None:
            return "channels of each"
        if len(sizes) == 3 and sizes[1:] == [1, 1]:
            return "channels"
        return "image" if len(sizes) == 4 else None

    def _concat(self, node: ir.Node) -> bool:
        if graph.attribute(node, "axis") not in (1, -3) or None in node.inputs:
            return False
        emit = self.emitter(node)
        parts = [self.last(value, emit) for value in node.inputs if value is not None]
        return self._again(node, parts, emit, axis=3)

    def _resize(self, node: ir.Node) -> bool:
        """Nearest only: onnxruntime 1.31's CUDA kernels of other modes want channels first."""
        nearest = graph.attribute(node, "mode", "nearest") == "nearest"
        given = [v for v in node.inputs[1:] if v is not None and 0 not in (v.shape or ())]
        if not nearest or "axes" in node.attributes or len(given) != 1:
            return False
        emit, place = self.emitter(node), list(node.inputs).index(given[0])
        inputs = list(node.inputs)
        assert inputs[0] is not None
        inputs[0] = self.last(inputs[0], emit)
        inputs[place] = self._reordered(given[0], emit)
        return self._again(node, inputs, emit)

    def _reordered(self, sizes: ir.Value, emit: graph.Emitter) -> ir.Value:
        array = graph.constant(sizes)
        if array is not None:
            return emit.const(array[list(TO_LAST)], array.dtype)
        return emit("Gather", sizes, emit.const(TO_LAST), axis=0)

    def _shape(self, node: ir.Node) -> bool:
        start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end")
        axes, emit = TO_FIRST[start:end], self.emitter(node)
        assert node.inputs[0] is not None
        source = self.last(node.inputs[0], emit)
        if len(axes) == 1:
            sizes = emit("Shape", source, start=axes[0], end=axes[0] + 1)
        else:
            sizes = emit("Gather", emit("Shape", source), emit.const(axes), axis=0)
        sizes.type, sizes.shape = node.outputs[0].type, node.outputs[0].shape
        graph.replace_uses(node.outputs[0], sizes)
        graph.remove_dead([node])
        return True

    def _pad(self, node: ir.Node) -> bool:
        pads = graph.constant(node.inputs[1]) if len(node.inputs) < 4 else None
        if pads is None or pads.size != 8:
            return False
        emit = self.emitter(node)
        assert node.inputs[0] is not None
        order = [*TO_LAST, *(4 + axis for axis in TO_LAST)]
        inputs = [self.last(node.inputs[0], emit), emit.const(pads[order]), *node.inputs[2:]]
        return self._again(node, inputs, emit)

    def _transpose(self, node: ir.Node) -> bool:
        source, out = node.inputs[0], node.outputs[0]
        assert source is not None
        perm = [TO_FIRST[axis] for axis in graph.attribute(node, "perm", (3, 2, 1, 0))]
        emit = self.emitter(node)
        same = self.last(source, emit)
        if perm != sorted(perm):
            same = emit("Transpose", same, perm=perm)
            same.type, same.shape = out.type, out.shape
        elif out.is_graph_output():
            return False
        graph.replace_uses(out, same)
        graph.remove_dead([node])
        return True

    def enter(self, node: ir.Node) -> None:
        """Note that a Transpose to channels-first has its channels-last form in front of it."""
        if tuple(graph.attribute(node, "perm", ())) == TO_FIRST and node.inputs[0] is not None:
            self._last[node.outputs[0]] = node.inputs[0]
            self._backs.append(node)


def _permuted(shape: ir.Shape | None, order: Sequence[int]) -> ir.Shape | None:
    if shape is None or len(shape) != len(order):
        return None
    return ir.Shape([shape[axis] for axis in order])
