"""The operands of a written-out attention as ``[B, heads, S, D]``, and its result back."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import ONE, Dim, Dims, over
from sdopt.passes._raise_grouped import before_repetition
from sdopt.passes._raise_products import Product, perm
from sdopt.passes._raise_scale import NotRaisedError, scaled
from sdopt.passes._raise_scores import Scores
from sdopt.passes._raise_shapes import Shapes


def check_batches(found: Product, shapes: Shapes, words: str) -> None:
    """Refuse a product that may broadcast its batches: MatMul does so, and Attention does not.

    A size that is a number above 1 times something is never 1, and where none of two is 1 MatMul
    itself demands that they are equal.

    Raises:
        NotRaisedError: saying which.
    """
    sides = [shapes.dims(value) for value in (found.left, found.right)]
    for letter in found.batch:
        sizes = [
            dims[axes.index(letter)]
            for dims, axes in zip(sides, found.axes, strict=False)
            if dims is not None
        ]
        if len(sizes) < 2:
            raise NotRaisedError(f"the shapes of {words} are not known")
        a, b = sizes
        if a != b and (min(a.number, b.number) < 2 or (a.known and b.known)):
            what = "batches or numbers of heads"
            known = a.known is not None and b.known is not None
            raise NotRaisedError(
                f"{words} have different {what}"
                if known
                else f"{words} are not known to have equal {what}, and a product "
                "repeats a batch of 1: export with one name for both, or with numbers"
            )


@dataclass
class Operand:
    """A value, and the letters of its axes."""

    value: ir.Value
    axes: str


_ORDER = "NBHijde"
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _ordered(axes: str) -> str:
    return "".join(letter for letter in _ORDER if letter in axes)


def _source_of(node: ir.Node | None) -> ir.Value | None:
    return node.inputs[0] if node is not None else None


def _source(value: ir.Value | None) -> ir.Value | None:
    """The first input of what makes ``value``."""
    return _source_of(value.producer()) if value is not None else None


def _one(found: list[int | None]) -> int | None:
    return found[0] if len(set(found)) == 1 else None


class Operands:
    """q, k and v of ``[B, heads, S, D]``, written before the product with v."""

    def __init__(self, found: Scores, shapes: Shapes) -> None:
        self.shapes, self.found = shapes, found
        self.dtype = self._widest((found.q, found.k, found.v))
        self.factors = list(found.factors)
        self.parts = [
            self._unscaled(Operand(value, found.axes[name]), scales=name != "v")
            for name, value in (("q", found.q), ("k", found.k), ("v", found.v))
        ]
        sources = [self._merged(part) for part in self.parts]
        self.heads = found.heads or _one([s[1] if s else None for s in sources])
        for index, source in enumerate(sources):
            if source is not None and source[1] == self.heads:
                self.parts[index] = self._unscaled(source[0], scales=index < 2)
        self.inputs: list[ir.Value] = []

    def _widest(self, values: tuple[ir.Value, ...]) -> ir.DataType:
        """The type that the Attention computes in."""
        kinds = {self.shapes.dtype(value) for value in values}
        if None in kinds:
            raise NotRaisedError("the types of q, k and v are not known")
        if len(kinds) > 1 and not kinds <= _HALF | {ir.DataType.FLOAT}:
            raise NotRaisedError("q, k and v have different types")
        return ir.DataType.FLOAT if len(kinds) > 1 else next(k for k in kinds if k is not None)

    def _is_repeated(self, node: ir.Node) -> bool:
        """Whether it is a Cast that ``write`` repeats: to the same type, or of half to float32."""
        if node.op_type != "Cast":
            return False
        old, new = self.shapes.dtype(node.inputs[0]), self.shapes.dtype(node.outputs[0])
        return old == new or (old in _HALF and new == ir.DataType.FLOAT)

    def _unscaled(self, part: Operand, *, scales: bool) -> Operand:
        """``part`` before it was scaled, in the wanted order of axes if it ever had that."""
        one, kept = part, None
        while True:
            if kept is None and one.axes == _ordered(one.axes):
                kept = one
            node = one.value.producer()
            if node is None or node.domain not in ("", "ai.onnx"):
                return kept or one
            found = scaled(node, self.shapes) if scales else None
            if found is not None and self._keeps_rank(node, found[0]):
                self.factors.append(found[1:])
                one, kept = Operand(found[0], one.axes), None
            elif node.op_type == "Transpose" and node.inputs[0] is not None:
                order = perm(one.value)
                back = [order.index(axis) for axis in range(len(order))]
                one = Operand(node.inputs[0], "".join(one.axes[axis] for axis in back))
            elif self._is_repeated(node) and node.inputs[0] is not None:
                one, kept = Operand(node.inputs[0], one.axes), None
            elif (around := self._around(one)) is not None:
                one = around
            else:
                return kept or one

    def _around(self, one: Operand) -> Operand | None:
        """What k is transposed from, in 3-D: heads joined, axes swapped, heads split again.

        So torch's dynamo exporter writes ``k.transpose(-2, -1)`` of 4-D at opset 18.
        """
        split = graph.producer(one.value, "Reshape")
        joined = graph.producer(_source(_source_of(split)), "Reshape")
        if joined is None or split is None or perm(split.inputs[0]) != [0, 2, 1]:
            return None
        source = joined.inputs[0]
        dims = [self.shapes.dims(v) for v in (source, joined.outputs[0], one.value)]
        if source is None or any(
            d is None or len(d) != n for d, n in zip(dims, (4, 3, 4), strict=True)
        ):
            return None
        before, flat, after = (list(d or ()) for d in dims)
        b, h, rows, columns = before
        if flat[1:] != [rows, columns] or after != [b, h, columns, rows]:
            return None
        return Operand(source, one.axes[:2] + one.axes[:1:-1])

    def _keeps_rank(self, node: ir.Node, source: ir.Value) -> bool:
        """A scale of shape [1, 1, 1] would add an axis to a matrix."""
        a, b = self.shapes.dims(source), self.shapes.dims(node.outputs[0])
        return a is None or b is None or len(a) == len(b)

    def _merged(self, part: Operand) -> tuple[Operand, int] | None:
        """The ``[B, heads, ., .]`` value that a 3-D one is reshaped from, and its heads."""
        reshape = graph.producer(part.value, "Reshape")
        source = reshape.inputs[0] if reshape is not None else None
        before, after = self.shapes.dims(source), self.shapes.dims(part.value)
        if source is None or before is None or after is None or len(before) != 4:
            return None
        heads = before[1].known
        if heads is None or list(before[2:]) != list(after[1:]) or part.axes[0] != "N":
            return None
        return Operand(source, "BH" + part.axes[1:]), heads

    def write(self, emit: graph.Emitter) -> list[ir.Value]:
        """The three values in one type, and grouped heads as they were before their repetition."""
        self.inputs = [self._whole(part, emit) for part in self.parts]
        grouped = [before_repetition(value, self.shapes) for value in self.inputs[1:]]
        if None not in grouped and len({one[1] for one in grouped if one is not None}) == 1:
            self.inputs[1:] = [one[0] for one in grouped if one is not None]
        for index, old in enumerate(self.inputs):
            if self.shapes.dtype(old) != self.dtype:
                new = emit("Cast", old, to=int(self.dtype))
                self.shapes.declare(new, self.shapes.dims(old), self.dtype)
                self.inputs[index] = new
        return self.inputs

    def _whole(self, part: Operand, emit: graph.Emitter) -> ir.Value:
        wanted = _ordered(part.axes)
        value = part.value
        if part.axes != wanted:
            order = [part.axes.index(letter) for letter in wanted]
            value = emit("Transpose", value, perm=order)
            dims = self.shapes.dims(part.value)
            new = None if dims is None else [dims[axis] for axis in order]
            self.shapes.declare(value, new, self.shapes.dtype(part.value))
        if wanted.startswith("B"):
            return value
        if wanted.startswith("N"):
            return self.split(value, emit)
        dims = self.shapes.dims(value)
        flat = emit("Unsqueeze", value, emit.const([0, 1]))
        new = None if dims is None else [ONE, ONE, *dims]
        self.shapes.declare(flat, new, self.shapes.dtype(value))
        return flat

    def split(self, value: ir.Value, emit: graph.Emitter) -> ir.Value:
        """``[N, ., .]`` as ``[B, heads, ., .]``, with one head where nobody knows the heads."""
        dims = self.shapes.dims(value)
        if self.heads is None:
            out = emit("Unsqueeze", value, emit.const([1]))
            new: Dims | None = None if dims is None else [dims[0], ONE, *dims[1:]]
        else:
            sizes = [dim.known for dim in dims[1:]] if dims is not None else [None]
            if None in sizes:
                tail = emit("Shape", value, start=1, end=3)
                shape = emit("Concat", emit.const([-1, self.heads]), tail, axis=0)
            else:
                shape = emit.const([-1, self.heads, *sizes])
            out = emit("Reshape", value, shape)
            heads = Dim(self.heads)
            new = None if dims is None else [over(dims[0], heads), heads, *dims[1:]]
        self.shapes.declare(out, new, self.shapes.dtype(value))
        return out

    def put_back(self, out: ir.Value, emit: graph.Emitter) -> list[ir.Node]:
        """Let the readers of the old result read ``out`` of ``[B, heads, S, D]``; dead nodes."""
        old, axes = self.found.second.out, self.found.axes["out"]
        kind = self.shapes.dtype(old)
        if kind not in (None, self.dtype):
            dims = self.shapes.dims(out)
            out = emit("Cast", out, to=int(kind or self.dtype))
            self.shapes.declare(out, dims, kind)
        dead = [self.found.second.node]
        if axes.startswith("N") and axes[1:] == "ie" and self.heads is not None:
            dead += self._rejoined(old, out, emit)
            if set(old.consumers()) <= set(dead) and not old.is_graph_output():
                return dead
        value = out
        wanted = _ordered(axes)
        if wanted == "ie":
            value = emit("Squeeze", value, emit.const([0, 1]))
        elif wanted.startswith("N") and self.heads is None:
            value = emit("Squeeze", value, emit.const([1]))
        elif wanted.startswith("N"):
            tail = emit("Shape", value, start=2, end=4)
            value = emit("Reshape", value, emit("Concat", emit.const([-1]), tail, axis=0))
        if wanted != axes:
            value = emit("Transpose", value, perm=[wanted.index(letter) for letter in axes])
        self.shapes.stands_for(value, old)
        graph.replace_uses(old, value)
        return dead

    def _rejoined(self, old: ir.Value, out: ir.Value, emit: graph.Emitter) -> list[ir.Node]:
        """Readers that split the heads again read the whole; what measures it measures that."""
        users = list(dict.fromkeys(old.consumers()))
        splitting = [
            user
            for user in users
            if user.op_type == "Reshape" and self._splits(old, user.outputs[0])
        ]
        measuring = [user for user in users if user.op_type == "Shape" and not user.attributes]
        dead = list(splitting)
        if measuring and len(splitting) + len(measuring) == len(users):
            batch = emit("Mul", emit("Shape", out, start=0, end=1), emit.const([self.heads or 1]))
            shape = emit("Concat", batch, emit("Shape", out, start=2, end=4), axis=0)
            for user in measuring:
                graph.replace_uses(user.outputs[0], shape)
            dead += [*measuring, *(node for node in [shape.producer()] if node is not None)]
        for user in splitting:
            self.shapes.stands_for(out, user.outputs[0])
            graph.replace_uses(user.outputs[0], out)
        return dead

    def _splits(self, old: ir.Value, new: ir.Value) -> bool:
        """Whether ``new`` is ``old`` of ``[N, S, D]`` with its heads split as q's are."""
        dims, to = self.shapes.dims(old), self.shapes.dims(new)
        if dims is None or to is None or len(to) != 4 or self.heads is None:
            return False
        return to[1] == Dim(self.heads) and list(to[2:]) == list(dims[1:])
