"""The layers of a graph that hold a weight: convolutions and linear layers, and their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes.base import PassContext

_OPS = ("Conv", "MatMul", "Gemm")
_STANDARD = ("", "ai.onnx")
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class Layer:
    """``node`` computes a layer of ``x`` and of ``weight``, which input ``slot`` of ``holder`` is.

    ``holder`` is ``node`` itself, or the Transpose that turns the weight for it.

    Attributes:
        kind: ``conv`` or ``linear`` (MatMul and Gemm).
        outputs: the weight's axis of output channels.
        inputs: the axis that is summed over (of a kernel, its input channels).
    """

    node: ir.Node
    x: ir.Value
    holder: ir.Node
    slot: int
    weight: ir.Value
    kind: str
    outputs: int
    inputs: int

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The weight."""
        if self.weight.const_value is None:
            raise TypeError("the weight of a layer is an initializer")
        return self.weight.const_value

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(int(size) for size in self.tensor.shape.numpy())


@dataclass(frozen=True)
class Refused:
    """A node that computes with a weight and cannot be changed, and why."""

    node: ir.Node
    kind: str
    reason: str
    done: bool = False
    """Whether it is because the weight is quantized already."""


def find(model: ir.Model) -> Iterator[Layer | Refused]:
    """Every layer of the main graph, in order, and what of the whole model is none."""
    for node in graph.nodes(model):
        if node.op_type not in _OPS or node.domain not in _STANDARD:
            continue
        kind = "conv" if node.op_type == "Conv" else "linear"
        found = _layer(node, kind)
        if isinstance(found, Layer) and node.graph is not model.graph:
            yield Refused(node, kind, "it lies in the body of a control flow operator")
        elif found is not None:
            yield found


def _layer(node: ir.Node, kind: str) -> Layer | Refused | None:
    x, right = node.inputs[0], node.inputs[1]
    if x is None or right is None:
        return None
    transpose = graph.producer(right, "Transpose")
    turned = transpose is not None and graph.attribute(transpose, "perm") in ([1, 0], (1, 0))
    holder, slot = (transpose, 0) if turned and transpose is not None else (node, 1)
    weight = holder.inputs[slot]
    if graph.producer(weight, "DequantizeLinear") is not None:
        return Refused(node, kind, "its weight is quantized already", done=True)
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        first = node.op_type == "MatMul" and x.is_initializer()
        return Refused(node, kind, "its weight is on the left") if first else None
    if weight.is_graph_input():
        return Refused(node, kind, f"{weight.name} is an input, which a caller may override")
    rank, dtype = len(weight.const_value.shape), weight.const_value.dtype
    if dtype not in _FLOATS:
        return Refused(node, kind, f"its weight is {dtype.name.lower()}")
    if rank != 2 and node.op_type != "Conv":
        return Refused(node, kind, f"its weight has {rank} axes, and a matrix has two")
    outputs_first = node.op_type == "Conv" or turned
    if node.op_type == "Gemm":
        if graph.attribute(node, "transA", 0):
            return Refused(node, kind, "its input is transposed (transA)")
        outputs_first = bool(graph.attribute(node, "transB", 0)) != turned
    outputs = 0 if outputs_first else 1
    return Layer(node, x, holder, slot, weight, kind, outputs, 1 - outputs)


def choose(
    model: ir.Model,
    keep: Sequence[str],
    with_ends: bool,
    unfit: Callable[[Layer, int], str | None],
    ctx: PassContext,
) -> list[Layer]:
    """The layers to change; ``ctx`` is told of all others.

    ``unfit`` says of a layer, in the graph's opset, why it cannot be changed.
    """
    layers = []
    for one in find(model):
        if isinstance(one, Layer):
            layers.append(one)
        elif one.done:
            ctx.already(one.kind)
        else:
            ctx.skip(one.reason, one.node, one.kind)
    kept = {} if with_ends else ends(model, layers)
    for entry in keep:
        named = [one.node for one in layers if _is_named(one.node, entry)]
        kept |= dict.fromkeys(named, f"keep={entry}")
        if not named:
            ctx.skip(f"keep={entry} names no layer of this graph", entry)
    stay = {one.holder for one in layers if one.node in kept}
    chosen = []
    for layer in layers:
        reason = kept.get(layer.node) or unfit(layer, graph.opset(model))
        if reason is None and layer.holder in stay:
            reason = "it shares its weight with a layer that stays"
        if reason is None:
            chosen.append(layer)
        else:
            ctx.skip(reason, layer.node, layer.kind)
    return chosen


def _is_named(node: ir.Node, entry: str) -> bool:
    return entry == node.op_type or graph.in_module(graph.module_path(node), entry)


def ends(model: ir.Model, layers: Iterable[Layer]) -> dict[ir.Node, str]:
    """The layers that alone read an input of the graph, or alone make an output, and which."""
    nodes = {layer.node for layer in layers}
    found: dict[ir.Node, str] = {}
    for value in model.graph.outputs:
        made = _reached(value, nodes, forwards=False)
        if len(made) == 1:
            found[made.pop()] = f"it alone makes the output {value.name}"
    for value in model.graph.inputs:
        read = _reached(value, nodes, forwards=True)
        if len(read) == 1:
            found[read.pop()] = f"it alone reads the input {value.name}"
    return found


def _reached(start: ir.Value, layers: set[ir.Node], *, forwards: bool) -> set[ir.Node]:
    """The layers that values flow to (or come from) without another one between.

    Sizes (Shape) are no values, and an embedding table is a layer of its own kind.
    """
    stack, seen, found = [start], {start}, set()
    while stack:
        value = stack.pop()
        maker = value.producer()
        nodes = list(value.consumers()) if forwards else [maker] if maker is not None else []
        for node in nodes:
            if node in layers:
                found.add(node)
            elif node.op_type not in ("Shape", "Size") and not _is_embedding(node):
                following = node.outputs if forwards else node.inputs
                fresh = [one for one in following if one is not None and one not in seen]
                seen.update(fresh)
                stack += fresh
    return found


def _is_embedding(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" and node.inputs else None
    return table is not None and table.const_value is not None and len(table.const_value.shape) > 1
