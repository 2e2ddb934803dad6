"""Copying a part of the main graph into a companion, the weights shared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sdopt import companions, graph


def like(value: ir.Value, other: ir.Value) -> ir.Value:
    """``value`` with its own copy of another value's type and shape."""
    value.type = copy.deepcopy(other.type)
    value.shape = None if other.shape is None else ir.Shape(list(other.shape))
    return value


class Extraction:
    """A companion being filled with copies of the main graph's nodes.

    What a copied node reads is copied with it where it is made of constants and sizes, and is an
    input of the companion where it is an input of the main graph or is in ``given``. The size of
    an input that the companion does not take itself comes from one that it takes, where both
    state the same name for that dimension, and else as an input of its own (see
    ``companions.Plan.sizes``).
    """

    def __init__(
        self, main: ir.Model, target: ir.Model, given: Iterable[ir.Value], own: Sequence[ir.Value]
    ) -> None:
        self._attached = companions.attach(main)
        self._target = target
        self._given = set(given)
        self._own = list(own)
        self._copies: dict[ir.Value, ir.Value] = {}
        self._sizes: dict[str, ir.Value] = {}
        self._fresh = 0

    def node(self, node: ir.Node) -> None:
        """Copy a node, and first what it reads."""
        inputs = [None if value is None else self.value(value) for value in node.inputs]
        made = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        for value, original in zip(made.outputs, node.outputs, strict=True):
            value.name = original.name
            self._copies[original] = like(value, original)
        self._target.graph.append(made)

    def value(self, value: ir.Value) -> ir.Value:
        """The companion's own of a value of the main graph."""
        if value in self._copies:
            return self._copies[value]
        node = value.producer()
        if value in self._given or value.is_graph_input():
            made = like(self._input(value.name or ""), value)
            if value.is_initializer():  # a weight that a caller may override stays one
                made.const_value = value.const_value
                self._target.graph.register_initializer(made)
        elif node is None:
            if value.const_value is None:
                raise TypeError(f"{value.name} has neither a producer nor a value")
            made = graph.add_initializer(self._target.graph, value.const_value, value.name or "")
        elif node.op_type == "Shape" and not node.domain and node.inputs[0] is not None:
            made = self._shape(node, node.inputs[0])
        else:
            self.node(node)
            return self._copies[value]
        self._copies[value] = made
        return made

    def give(self, values: Iterable[ir.Value]) -> None:
        """Let the companion give its own of these values."""
        self._target.graph.outputs.extend(self.value(value) for value in values)

    def _input(self, name: str) -> ir.Value:
        made = ir.Value(name=name)
        self._target.graph.inputs.append(made)
        return made

    def _shape(self, node: ir.Node, source: ir.Value) -> ir.Value:
        """The dimensions that a Shape node gives of an input of the main graph."""
        if source in self._own or not source.is_graph_input() or source.shape is None:
            self.node(node)
            return self._copies[node.outputs[0]]
        dims = list(enumerate(source.shape))
        part = slice(graph.attribute(node, "start", 0), graph.attribute(node, "end"))
        parts = [self._size(source, axis, dim) for axis, dim in dims[part]]
        return parts[0] if len(parts) == 1 else self._emit("Concat", *parts, axis=0)

    def _size(self, source: ir.Value, axis: int, dim: int | ir.SymbolicDim) -> ir.Value:
        """One dimension as int64 ``[1]``."""
        if isinstance(dim, int):
            return self._const([dim])
        name = str(dim.value) if dim.value is not None else f"{source.name}_size_{axis}"
        if name in self._sizes:
            return self._sizes[name]
        for own in self._own if dim.value is not None else ():
            axes = [i for i, other in enumerate(own.shape or ()) if other == dim]
            if axes:
                whole = self._emit("Shape", self.value(own))
                made = self._emit("Gather", whole, self._const(axes[:1]))
                break
        else:
            self._attached.sizes[name] = (source.name or "", axis)
            made = self._input(name)
            made.type, made.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        self._sizes[name] = made
        return made

    def _emit(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, name=self._name(op_type))
        node.outputs[0].name = self._name(f"{op_type}_out")
        self._target.graph.append(node)
        return node.outputs[0]

    def _const(self, numbers: list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64))
        return graph.add_initializer(self._target.graph, tensor, self._name("const"))

    def _name(self, hint: str) -> str:
        self._fresh += 1
        return f"sdopt.size/{hint}_{self._fresh}"
