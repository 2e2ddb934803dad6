"""What is added in front of a norm: the two sides of the sum, and a bias on one of them."""

from __future__ import annotations

import onnx_ir as ir

from sdopt import graph, weights

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


def gathered_bias(
    bias: ir.Value | None, skip: ir.Value, emit: graph.Emitter
) -> tuple[ir.Value, ir.Value | None]:
    """The skip of a group norm before its own convolution's bias, and both biases as one.

    The norm adds one bias to the sum anyway, and a convolution's is a launch of its own.
    """
    if not _has_bias(skip, "group_norm"):
        return skip, bias
    plain, second = without_bias(skip, "group_norm", emit)
    tensors = [v.const_value for v in (bias, second) if v is not None]
    if bias is None or len(tensors) < 2:
        return plain, second
    return plain, emit.weight(weights.add(tensors[0], tensors[1]), "bias")  # type: ignore[arg-type]


def bias_as_skip(norm: ir.Node, emit: graph.Emitter) -> tuple[ir.Value, ir.Value] | None:
    """For a norm of a convolution's pixels as tokens: those before its bias, and the bias.

    The bias comes as ``[S, C]``, which SkipLayerNormalization adds to every image of the batch.
    """
    flat = graph.producer(norm.inputs[0], "Reshape")
    if flat is None or flat.inputs[0] is None or not _has_bias(flat.inputs[0], "group_norm"):
        return None
    rank = graph.rank(flat.outputs[0])
    if rank != 3 or graph.static_dim(flat.outputs[0], 2) is None:
        return None
    plain, bias = without_bias(flat.inputs[0], "group_norm", emit)
    if bias is None or bias.const_value is None:
        return None
    tokens = emit("Reshape", plain, *flat.inputs[1:])
    tokens.type, tokens.shape = flat.outputs[0].type, flat.outputs[0].shape
    skip = emit("Expand", bias, emit("Shape", tokens, start=1, end=3))
    skip.type = flat.outputs[0].type
    return tokens, skip
