"""What the rules of ``lower_opset`` share: the two opsets, what is known of values, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from sdopt import graph
from sdopt.errors import BuildError
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext


@dataclass
class Rules:
    """A model on its way from the opset ``given`` to ``opset``."""

    model: ir.Model
    given: int
    opset: int
    ctx: PassContext
    shapes: Shapes = field(init=False)
    found: set[ir.Node] = field(init=False)
    written: set[ir.Node] = field(default_factory=set)
    """Those of the nodes that were there which are written in another way."""

    def __post_init__(self) -> None:
        self.shapes = Shapes(self.model.graph)
        self.found = set(graph.nodes(self.model))

    def crosses(self, version: int) -> bool:
        """Whether the way leads from a version of an operator to the one before it."""
        return self.opset < version <= self.given

    def mark(self, node: ir.Node) -> None:
        """Count a node once, and not the parts that it was written in."""
        if node in self.found:
            self.written.add(node)

    def emit(self, node: ir.Node) -> graph.Emitter:
        """Inserts nodes before ``node``."""
        return self.ctx.emitter(node, f"{graph.module_path(node)}/lower_opset")

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes."""
        dims = self.shapes.dims(value)
        return len(dims) if dims is not None else None

    def replace(self, node: ir.Node, new: ir.Value) -> None:
        """Let ``new`` stand for the first output of ``node``, which goes."""
        self.mark(node)
        self.shapes.stands_for(new, node.outputs[0])
        graph.replace_uses(node.outputs[0], new)
        graph.remove_dead([node])

    def constants(self, node: ir.Node, index: int, what: str, least: int) -> list[int] | None:
        """The numbers of an input that an older version has as an attribute; None without it.

        Raises:
            BuildError: it is computed.
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        array = graph.constant(value)
        if array is None:
            raise refused(self, node, f"its {what} are computed", least=least)
        return [int(number) for number in array.reshape(-1)]


def refused(rules: Rules, node: ir.Node, why: str, *, least: int | None = None) -> BuildError:
    """The error of a node that the opset cannot say; ``least`` is one that can."""
    bfloat = " (or cast_fp16 where cast_bf16 was asked for)" if "bfloat16" in why else ""
    hint = f"lower_opset={least} can say it{bfloat}" if least else f"rewrite it first{bfloat}"
    return BuildError(
        f"{node.op_type} cannot be written in opset {rules.opset}",
        where=f"{graph.module_path(node)} (node {node.name})",
        why=why if why.startswith("the opset") else f"in opset {rules.opset}: {why}",
        hint=hint,
    )


def has_opset(name: str, opset: int) -> bool:
    """Whether that opset has an operator of that name."""
    try:
        onnx.defs.get_schema(name, opset)
    except onnx.defs.SchemaError:
        return False
    return True


def introduced(name: str) -> int:
    """The opset that brought an operator."""
    newest = onnx.defs.get_schema(name).since_version
    return next(opset for opset in range(1, newest + 1) if has_opset(name, opset))


def bad_type(rules: Rules, node: ir.Node) -> tuple[str, int | None] | None:
    """An element type that the opset's version of the operator lacks, and an opset that has it."""
    values = [(i, v, "inputs") for i, v in enumerate(node.inputs) if v is not None]
    values += [(i, v, "outputs") for i, v in enumerate(node.outputs)]
    for index, value, side in values:
        word = _word(value, rules.shapes.dtype(value))
        if not word:
            continue
        able = [
            opset
            for opset in range(rules.opset, rules.given + 1)
            if word in _allowed(onnx.defs.get_schema(node.op_type, opset), side, index)
        ]
        if rules.opset not in able and rules.given in able:
            return word.removeprefix("tensor(").removesuffix(")"), able[0]
    return None


def _word(value: ir.Value, dtype: ir.DataType | None) -> str:
    """The type as schemas write it, ``seq(tensor(float))``; empty if it is not known."""
    if dtype is None:
        return ""
    word, kind = f"tensor({dtype.name.lower()})", value.type
    wraps = []
    while isinstance(kind, ir.SequenceType | ir.OptionalType):
        wraps.append("seq" if isinstance(kind, ir.SequenceType) else "optional")
        kind = kind.elem_type
    for wrap in reversed(wraps):
        word = f"{wrap}({word})"
    return word


def _allowed(schema: onnx.defs.OpSchema, side: str, index: int) -> set[str]:
    formal = getattr(schema, side)
    if not formal:
        return set()
    one = formal[min(index, len(formal) - 1)]
    constraint = next(
        (c for c in schema.type_constraints if c.type_param_str == one.type_str), None
    )
    return set(constraint.allowed_type_strs) if constraint is not None else {one.type_str}
