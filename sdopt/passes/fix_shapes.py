"""``fix_shapes``: dynamic axes at the sizes that a compiler without them is to build for."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import Interface, Numerics, Pass, PassContext
from sdopt.shapes import number_of

_OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_AXIS = re.compile(r"(\w+)@(\d+)")


@dataclass(frozen=True)
class FixShapes(Pass):
    """Give dynamic axes a fixed size, by name.

    Before / After:
        sample [batch_size, 4, height, width]  ->  sample [2, 4, 64, 64]

    Applies when: an axis of an input has one of the names. Every value that is declared with the
    name, or with arithmetic of such names, gets the number; ``clean`` behind it then folds the
    shape arithmetic. Names that the graph does not have are passed over; ``height_div_2`` follows
    ``height``.

    Numerics: exact.

    Options:
        axes: NAME@SIZE, joined by ``+``.

    Counts: ``axis``, those of the inputs.

    Example:
        sdopt optimize BUNDLE --passes fix_shapes=batch_size@2+height@64+width@64,clean
    """

    axes: tuple[str, ...]

    numerics: ClassVar[Numerics] = Numerics.EXACT
    interface: ClassVar[Interface] = Interface.CHANGES

    def __post_init__(self) -> None:
        for one in self.axes:
            if (found := _AXIS.fullmatch(one)) is None or not int(found[2]):
                raise ValueError(f"an axis is NAME@SIZE, not {one}")
        if len(self.sizes()) < len(self.axes):
            raise ValueError("an axis is named twice")

    def sizes(self) -> dict[str, int]:
        """Name of an axis to its size."""
        return {name: int(size) for name, _, size in (one.partition("@") for one in self.axes)}

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Write the numbers into every declared shape."""
        sizes = self.sizes()
        for value in model.graph.inputs:
            if count := _fix(value, sizes):
                ctx.count("axis", count)
        for one in model.graphs():
            for value in (*one.inputs, *one.outputs):
                _fix(value, sizes)
        for node in graph.nodes(model):
            for value in node.outputs:
                _fix(value, sizes)


def _fix(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """How many axes of a value got a number."""
    if value.shape is None:
        return 0
    dims = [_number(dim, sizes) for dim in value.shape]
    changed = sum(a != b for a, b in zip(dims, value.shape, strict=True))
    if changed:
        value.shape = ir.Shape(dims)
    return changed


def _number(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    """What the expression that names a dimension comes to, if all in it is known."""
    if isinstance(dim, int) or dim.value is None:
        return dim
    try:
        return _evaluate(ast.parse(dim.value, mode="eval").body, sizes)
    except (SyntaxError, LookupError, ZeroDivisionError):
        return dim


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    """Whole-number arithmetic as exporters write it into names (``2*((height - 1)//8)``).

    Raises:
        LookupError: anything else, or a name that has no size.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return int(node.value)
    if isinstance(node, ast.Name):
        return number_of(node.id, sizes)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, sizes)
    if isinstance(node, ast.BinOp):
        operation = _OPERATIONS[type(node.op)]
        return operation(_evaluate(node.left, sizes), _evaluate(node.right, sizes))
    raise LookupError(ast.dump(node))
