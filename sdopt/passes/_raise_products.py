"""MatMul and Einsum read as products of two values whose axes have letters."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_scale import NotRaisedError
from sdopt.passes._raise_shapes import Shapes

_BATCH = "ABCDEFGH"


@dataclass(frozen=True)
class Product:
    """``out = left @ right``; each side's axes as letters, as in Einsum.

    Letters that both sides and the result have are batches; the one that the result lacks is
    summed over; each side has one letter of its own.
    """

    node: ir.Node
    left: ir.Value
    right: ir.Value
    axes: tuple[str, str, str]
    """Of ``left``, ``right`` and the result."""

    @property
    def out(self) -> ir.Value:
        """The result."""
        return self.node.outputs[0]

    @property
    def batch(self) -> str:
        """The letters of the batches, in the result's order."""
        left, right, out = self.axes
        return "".join(c for c in out if c in left and c in right)

    @property
    def summed(self) -> str:
        """The letter that is summed over."""
        left, right, out = self.axes
        return next(c for c in left if c in right and c not in out)


def product(node: ir.Node, shapes: Shapes) -> Product:
    """What a MatMul or Einsum for which ``is_product`` holds computes.

    Raises:
        NotRaisedError: ranks that are not known or differ, or an Einsum that is no such product.
    """
    left, right = node.inputs
    assert left is not None
    assert right is not None
    if node.op_type == "Einsum":
        axes = _einsum_axes(node, shapes)
        if axes is None or not _is_plain(axes):
            equation = graph.attribute(node, "equation", "")
            raise NotRaisedError(f"its Einsum {equation!r} is no product of two matrices")
        return Product(node, left, right, axes)
    rank = _common_rank((left, right, node.outputs[0]), shapes)
    if rank is None:
        raise NotRaisedError("its operands are not known to have equally many axes")
    batch = _BATCH[: rank - 2]
    return Product(node, left, right, (f"{batch}id", f"{batch}dj", f"{batch}ij"))


def is_product(node: ir.Node | None) -> bool:
    """Whether two computed values are multiplied: a Linear's weight is not computed."""
    if node is None or node.op_type not in ("MatMul", "Einsum") or len(node.inputs) != 2:
        return False
    sides = [side for side in node.inputs if side is not None]
    return node.domain in ("", "ai.onnx") and len(sides) == 2 and not any(map(_is_stored, sides))


def _is_stored(value: ir.Value) -> bool:
    while (node := value.producer()) is not None and node.op_type in ("Transpose", "Cast"):
        if node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return value.producer() is None and not value.is_graph_input()


def _common_rank(values: tuple[ir.Value, ...], shapes: Shapes) -> int | None:
    """The rank of those among the values whose rank is known, if it is one."""
    ranks = {len(dims) for value in values if (dims := shapes.dims(value)) is not None}
    ranks |= {len(found) for value in values if (found := perm(value))}
    return ranks.pop() if len(ranks) == 1 else None


def perm(value: ir.Value | None) -> list[int]:
    """The permutation of the Transpose that makes ``value``, or an empty list."""
    node = graph.producer(value, "Transpose")
    return list(graph.attribute(node, "perm", [])) if node is not None else []


def _einsum_axes(node: ir.Node, shapes: Shapes) -> tuple[str, str, str] | None:
    """The letters of an Einsum's two operands and of its result, ellipses written out."""
    equation = str(graph.attribute(node, "equation", "")).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    sides = inputs.split(",")
    if not arrow or len(sides) != 2 or len(node.inputs) != 2:
        return None
    left, right = sides
    if "..." in equation:
        lengths = set()
        for side, value in zip(sides, node.inputs, strict=True):
            dims = shapes.dims(value)
            if dims is None or "..." not in side:
                return None
            lengths.add(len(dims) - len(side) + 3)
        if len(lengths) > 1 or "..." not in out:
            return None
        # Letters of an equation are ASCII; these stand for the axes of the ellipsis.
        filled = "".join(chr(0x3B1 + i) for i in range(lengths.pop()))
        left, right, out = (text.replace("...", filled) for text in (left, right, out))
    return left, right, out


def _is_plain(axes: tuple[str, str, str]) -> bool:
    """Whether there is one summed letter, and one letter that each side alone has."""
    left, right, out = axes
    if any(len(set(side)) < len(side) for side in axes) or set(out) - set(left + right):
        return False
    summed = [c for c in left if c in right and c not in out]
    own = [[c for c in a if c not in b] for a, b in ((left, right), (right, left))]
    return len(summed) == 1 and all(len(one) == 1 and one[0] in out for one in own)
