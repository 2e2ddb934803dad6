"""What is added in front of a norm: the two sides of the sum, and a bias on one of them."""

from __future__ import annotations

import onnx_ir as ir

from sdopt import graph

MICROSOFT = "com.microsoft"


def sides(add: ir.Node, kind: str) -> tuple[ir.Value, ir.Value] | str:
    """The value that is normalised and what is added to it, or why they are not known."""
    a, b = add.inputs[:2]
    if a is None or b is None or a.shape is None or b.shape is None:
        return "the shape of what is added to it is not known"
    if a is b:
        return "a value is added to itself"
    if list(a.shape) == list(b.shape):
        return (a, b) if _has_bias(a, kind) or not _has_bias(b, kind) else (b, a)
    if kind == "group_norm":
        for main, skip in ((a, b), (b, a)):
            per_channel = [graph.static_dim(skip, axis) for axis in range(len(skip.shape or ()))]
            whole = main.shape is not None and list(main.shape) == list(add.outputs[0].shape or ())
            same = (
                skip.shape is not None
                and main.shape is not None
                and (skip.shape[0] == main.shape[0] and skip.shape[-1] == main.shape[-1])
            )
            if whole and same and per_channel[1:3] == [1, 1]:
                return main, skip
    return "what is added to it has another shape"


def _has_bias(value: ir.Value, kind: str) -> bool:
    node = graph.producer(value, "Add" if kind == "layer_norm" else "NhwcConv", _domain(kind))
    if node is None or graph.single_consumer(value) is None:
        return False
    return len(node.inputs) > 2 if kind == "group_norm" else _bias_of(node) is not None


def _domain(kind: str) -> str:
    return "" if kind == "layer_norm" else MICROSOFT


def _bias_of(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The value and the ``[C]`` weight that an Add puts together."""
    for x, bias in (add.inputs[:2], add.inputs[1::-1]):
        tensor = bias.const_value if bias is not None and not bias.is_graph_input() else None
        if x is not None and bias is not None and tensor is not None and len(tensor.shape) == 1:
            return x, bias
    return None


def without_bias(
    value: ir.Value, kind: str, emit: graph.Emitter
) -> tuple[ir.Value, ir.Value | None]:
    """``value`` before its bias was added, and the bias; both as they are where there is none."""
    if not _has_bias(value, kind):
        return value, None
    node = value.producer()
    assert node is not None
    if kind == "layer_norm":
        found = _bias_of(node)
        assert found is not None
        if found[0].shape is None:
            found[0].type, found[0].shape = value.type, value.shape
        return found
    kept = {name: attr.value for name, attr in node.attributes.items()}
    made = emit("NhwcConv", *node.inputs[:2], domain=MICROSOFT, **kept)
    made.type, made.shape = value.type, value.shape
    return made, node.inputs[2]
