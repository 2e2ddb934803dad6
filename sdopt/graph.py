"""Reading and rewiring a graph: constants, module paths, counts, fingerprint, insertion.

Structure decides what a pass matches; names are used only to tell people where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdopt import weights

MODULE_KEY = "sdopt.module"
"""Metadata key of a node that holds its module path, such as ``down_blocks.0...attn1.to_q``."""

FLOAT32_KEY = "sdopt.float32"
"""Metadata key of a node that a later cast to half precision must leave in float32."""

SMALL_ELEMENTS = 1024
"""Constants up to this many elements may be read to understand a graph (shapes, scales, axes)."""


def module_path(node: ir.Node) -> str:
    """Where a node comes from: its module path, else its name, else its operator."""
    if path := node.metadata_props.get(MODULE_KEY):
        return path
    return node.name or node.op_type


def in_module(path: str, prefix: str) -> bool:
    """Whether a module path is ``prefix`` or lies below it; ``*`` in prefix matches one level."""
    parts, wanted = path.split("."), prefix.split(".")
    return len(parts) >= len(wanted) and all(
        want in ("*", part) for part, want in zip(parts, wanted, strict=False)
    )


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and, depth first, of its subgraphs."""
    yield from model.graph.all_nodes()


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of an If, Loop or Scan; none for other nodes."""
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def op_counts(model: ir.Model) -> dict[str, int]:
    """Operator name (``domain::op`` outside the standard domain) to count, most frequent first."""
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes(model)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def opset(model: ir.Model) -> int:
    """The version of the standard operator set that the model imports (0 if none)."""
    return model.opset_imports.get("", 0)


def vendor_ops(model: ir.Model) -> set[str]:
    """Operators in the standard domain that ONNX does not have, such as a compiler's plug-ins.

    TensorRT's plug-ins and Ascend's kernels are addressed so.
    """
    inlined = {function.name for function in model.functions.values() if not function.domain}
    found = {node.op_type for node in nodes(model) if node.domain in ("", "ai.onnx")}
    return {name for name in found - inlined if not onnx.defs.has(name)}


def constant(value: ir.Value | None, most: int = SMALL_ELEMENTS) -> np.ndarray | None:
    """The array behind a small constant (initializer or Constant node), else None.

    Never reads a weight: initializers of more than ``most`` elements answer None, and so do
    initializers that are also graph inputs, since a caller may override those.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    node = value.producer()
    if tensor is None and node is not None and node.op_type == "Constant" and not node.domain:
        tensor = constant_tensor(node)
    if tensor is None or tensor.size > most or tensor.dtype == ir.DataType.STRING:
        return None
    array = np.array(tensor.numpy())
    weights.release(tensor)
    return array


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor that a Constant node carries in whichever of its attributes."""
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        if name == "value":
            tensor: ir.TensorProtocol = attr.value  # as_tensor() asks isinstance of a Protocol
            return tensor
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.array(attr.value, np.int64))
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.array(attr.value, np.float32))
    return None


def scalar(value: ir.Value | None) -> float | None:
    """The number in a one-element constant, else None."""
    array = constant(value, most=1)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes ``value`` if it is of that operator, else None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type or node.domain not in (domain, "ai.onnx"):
        return None
    return node


def single_consumer(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``, or None if it has more readers or is a graph output."""
    users = list(value.consumers())
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def rank(value: ir.Value | None) -> int | None:
    """The number of axes that a value is declared to have, or None."""
    return len(value.shape) if value is not None and value.shape is not None else None


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis if it is declared and a number."""
    dim = value.shape[axis] if value is not None and value.shape is not None else None
    return dim if isinstance(dim, int) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """A node attribute's plain value, or ``default``."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.value


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``, keeping the names of graph outputs.

    Where ``old`` is a graph output, the name moves to ``new`` if ``new`` is free to take it, else
    an Identity keeps it: ``new`` may be an input, an output, a weight, or captured by a body.
    """
    graph = old.graph
    if graph is None or not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    name = old.name
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)
    taken = new.is_graph_input() or new.is_graph_output() or new.is_initializer()
    if taken or new.graph is not graph:
        node = ir.node("Identity", [new])
        graph.append(node)
        new = node.outputs[0]
    new.type, new.shape = old.type, old.shape
    old.name = None
    new.name = name
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def remove_dead(candidates: Iterable[ir.Node]) -> int:
    """Remove those nodes, and what only they needed, that nothing reads; returns how many."""
    removed, stack = 0, list(candidates)
    while stack:
        node = stack.pop()
        graph = node.graph
        if graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        feeds = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        removed += 1
        for value in feeds:
            if (feed := value.producer()) is not None:
                stack.append(feed)
            else:
                _drop_if_unused(value)
    return removed


def drop_unused_initializers(model: ir.Model) -> None:
    """Forget the initializers that nothing reads."""
    for one in model.graphs():
        for value in list(one.initializers.values()):
            _drop_if_unused(value)


def _drop_if_unused(value: ir.Value) -> None:
    if value.is_initializer() and not value.uses():
        owner = value.graph
        if isinstance(owner, ir.Graph) and not (value.is_graph_output() or value.is_graph_input()):
            del owner.initializers[value.name or ""]


def append_output_cast(
    one: ir.Graph, index: int, dtype: ir.DataType, unique: Callable[[str], str]
) -> None:
    """Put a Cast to ``dtype`` behind graph output ``index``; the output keeps its name."""
    value = one.outputs[index]
    name, value.name = value.name, unique(f"{value.name}_before_cast")
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=unique("cast_output"))
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), value.shape
    one.append(node)
    one.outputs[index] = output


class Emitter:
    """Inserts nodes before an anchor, with unique names and the anchor's module path.

    ``emit("MatMul", a, b)`` returns the new value; arrays and numbers become small initializers.
    """

    def __init__(self, anchor: ir.Node, unique: Callable[[str], str], label: str) -> None:
        self._anchor = anchor
        self._unique = unique
        self._label = label
        self.module = module_path(anchor)
        graph = anchor.graph
        if not isinstance(graph, ir.Graph):
            raise TypeError("an anchor must be in a graph")
        self._graph = graph

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node with one output; ``None`` leaves an optional input out."""
        return self.many(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def many(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs)
        node.name = self._unique(f"{self._label}/{op_type}")
        node.metadata_props[MODULE_KEY] = self.module
        for output in node.outputs:
            output.name = self._unique(f"{self._label}/{op_type}_out")
        self._graph.insert_before(self._anchor, node)
        return node.outputs

    def const(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant as an initializer."""
        return self.weight(ir.tensor(np.asarray(array, dtype)), "const")

    def weight(self, tensor: ir.TensorProtocol, hint: str) -> ir.Value:
        """An initializer holding ``tensor`` (lazy or not) under a unique name."""
        return add_initializer(self._graph, tensor, self._unique(f"{self._label}/{hint}"))


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Register ``tensor`` as the graph's initializer ``name``, at the root graph's level."""
    tensor.name = name
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
