"""Half precision on any CPU: the float32 graph with every value rounded that a cast makes half.

onnxruntime's CPU has few kernels in half precision. It computes the others in float32 and leaves
out the casts between two of them (1.31), so what overflows on a card stays finite there. Here a
node computes in float32 what it reads in half, and what it gives is rounded to half before
anything reads it: tensor cores do the same, adding up in float32 and storing half.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""The types by the word of the pass that casts to them (``cast_fp16``)."""

_MOVES = frozenset(
    {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Split", "Concat",
     "Gather", "Expand", "Identity", "Tile"}
)  # fmt: skip
"""Operators that compute nothing: of rounded numbers they give rounded ones."""

_READ_BYTES = 1 << 20
"""Of a weight that is taken from the cast graph as it is there, clipped masks among them."""


@dataclass
class Halves:
    """What a cast makes half of a graph, by node.

    Attributes:
        nodes: the names of the nodes that compute in half, in graph order, to their module paths.
        ops: name to operator.
        inputs: name to the numbers of the inputs that are read in half.
        outputs: name to the numbers of the outputs that are given in half.
        constants: (name, number of the input) to what a small weight became; number -1 is the
            value of a Constant.
        half: the type.
    """

    nodes: dict[str, str] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, frozenset[int]] = field(default_factory=dict)
    outputs: dict[str, frozenset[int]] = field(default_factory=dict)
    constants: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    half: ir.DataType = ir.DataType.FLOAT16

    def kept(self, keep: Collection[str]) -> frozenset[str]:
        """The nodes that a keep-list of module paths and operators leaves in float32."""
        return frozenset(
            name
            for name, path in self.nodes.items()
            if any(entry == self.ops[name] or graph.in_module(path, entry) for entry in keep)
        )


def name_nodes(model: ir.Model) -> None:
    """Give every node of the main graph a name of its own: a cast is told by them."""
    known: set[str] = set()
    for index, node in enumerate(model.graph):
        if not node.name or node.name in known:
            node.name = f"{node.op_type}_{index}.sdopt"
        known.add(node.name)


def halves_of(model: ir.Model, dtype: str, role: Role, keep: Collection[str] = ()) -> Halves:
    """Cast ``model``, which changes it, and say what became half."""
    before = {node.name for node in model.graph}
    spec = f"cast_{dtype}" + (f":keep={'+'.join(keep)}" if keep else "")
    Pipeline.parse(spec).run(model, RunContext(role=role))
    half, found = HALF[dtype], Halves(half=HALF[dtype])
    for node in model.graph:
        name = node.name or ""
        if name not in before:
            continue
        reads = {
            i for i, value in enumerate(node.inputs) if value is not None and _is(value, half)
        }
        gives = {i for i, value in enumerate(node.outputs) if _is(value, half)}
        if not reads and not gives:
            continue
        found.nodes[name], found.ops[name] = graph.module_path(node), node.op_type
        found.inputs[name], found.outputs[name] = frozenset(reads), frozenset(gives)
        for index, tensor in _constants(node, reads):
            found.constants[name, index] = tensor.numpy().astype(np.float32)
    return found


def _is(value: ir.Value, half: ir.DataType) -> bool:
    if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
        return False  # its dtype is that of its elements
    return (value.const_value.dtype if value.const_value is not None else value.dtype) == half


def _constants(node: ir.Node, reads: Collection[int]) -> Iterator[tuple[int, ir.TensorProtocol]]:
    """The small weights that a node reads, and what a Constant holds."""
    for index in reads:
        value = node.inputs[index]
        tensor = value.const_value if value is not None else None
        fixed = value is not None and value.is_initializer()
        if fixed and tensor is not None and tensor.nbytes <= _READ_BYTES:
            yield index, tensor
    if node.op_type == "Constant" and "value" in node.attributes:
        yield -1, node.attributes["value"].as_tensor()


def emulated(proto: onnx.ModelProto, halves: Halves, kept: Collection[str]) -> onnx.ModelProto:
    """The float32 graph, rounded where the cast one is half; ``kept`` nodes stay as they are."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.graph.node[:]
    del made.graph.value_info[:]
    rounding = _Rounding(made, halves)
    for node in proto.graph.node:
        if node.name in halves.nodes and node.name not in kept:
            rounding.half(node)
        else:
            made.graph.node.append(node)
    return made


class _Rounding:
    """Writes a graph whose half values are rounded, by a Cast there and one back."""

    def __init__(self, made: onnx.ModelProto, halves: Halves) -> None:
        self._graph, self._halves = made.graph, halves
        self._rounded: dict[str, str] = {}
        """Values to their rounded form, which is themselves where what gives them rounds."""

    def half(self, node: onnx.NodeProto) -> None:
        """Write a node that computes in half."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for index in self._halves.inputs[node.name]:
            made.input[index] = self._view(node, index)
        given = [made.output[index] for index in self._halves.outputs[node.name]]
        if node.op_type == "Constant" and (node.name, -1) in self._halves.constants:
            tensor = onnx.numpy_helper.from_array(self._halves.constants[node.name, -1])
            (attribute,) = [one for one in made.attribute if one.name == "value"]
            attribute.t.CopyFrom(tensor)
            self._rounded |= {name: name for name in given}
        moves = node.op_type in _MOVES and len(self._halves.inputs[node.name]) > 0
        if moves:
            self._rounded |= {name: name for name in given}
        names = [name for name in given if name not in self._rounded]
        for index, name in enumerate(made.output):
            if name in names:
                made.output[index] = f"{name}/exact"
        self._graph.node.append(made)
        for name in names:
            self._round(f"{name}/exact", name)
            self._rounded[name] = name

    def _view(self, node: onnx.NodeProto, index: int) -> str:
        name = node.input[index]
        if (tensor := self._halves.constants.get((node.name, index))) is not None:
            label = f"{name}/half"
            if self._rounded.get(name) != label:
                self._graph.initializer.append(onnx.numpy_helper.from_array(tensor, label))
                self._rounded[name] = label
        elif name not in self._rounded:
            self._rounded[name] = f"{name}/half"
            self._round(name, self._rounded[name])
        return self._rounded[name]

    def _round(self, source: str, target: str) -> None:
        there = onnx.helper.make_node(
            "Cast", [source], [f"{target}/narrow"], to=int(self._halves.half)
        )
        back = onnx.helper.make_node(
            "Cast", [f"{target}/narrow"], [target], to=onnx.TensorProto.FLOAT
        )
        self._graph.node.extend([there, back])
