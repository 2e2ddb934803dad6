"""Whether two states of a model are the same graph, without reading a weight."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from sdopt import companions


def fingerprint(model: ir.Model) -> str:
    """A hash of everything that decides what the model computes, weights by identity.

    Two states of a model with the same fingerprint are the same graph, so the runner measures
    whether a pass changed something instead of asking it. No weight is read: a file range counts
    by path and offset, a computed tensor by its object. The companions belong to the model.
    """
    state = hashlib.blake2b(digest_size=16)

    def put(*items: object) -> None:
        state.update("\x1f".join(map(str, items)).encode())
        state.update(b"\x1e")

    def tensor_key(tensor: ir.TensorProtocol) -> tuple[object, ...]:
        head: tuple[object, ...] = (tensor.dtype, tuple(tensor.shape))
        if isinstance(tensor, ir.ExternalTensor):
            return (*head, tensor.path, tensor.offset)
        if isinstance(tensor, ir.LazyTensor):
            return (*head, id(tensor))
        if isinstance(tensor, ir.StringTensor):
            return (*head, list(tensor.string_data()))
        return (*head, hashlib.blake2b(tensor.tobytes()).hexdigest())

    def graph_key(graph: ir.Graph) -> None:
        put("in", *[(v.name, v.type, v.shape) for v in graph.inputs])
        put("out", *[(v.name, v.type, v.shape) for v in graph.outputs])
        for name in sorted(graph.initializers):
            if (tensor := graph.initializers[name].const_value) is not None:
                put("w", name, *tensor_key(tensor))
        for node in graph:
            put("n", node.domain, node.op_type, node.overload)
            put(*[value.name if value is not None else "" for value in node.inputs])
            put(*[value.name for value in node.outputs])
            for key in sorted(node.attributes):
                attr = node.attributes[key]
                if attr.is_ref():
                    put("ref", key, attr.ref_attr_name)
                elif attr.type == ir.AttributeType.GRAPH:
                    put("g", key)
                    graph_key(attr.as_graph())
                elif attr.type == ir.AttributeType.GRAPHS:
                    put("gs", key)
                    for sub in attr.as_graphs():
                        graph_key(sub)
                elif attr.type == ir.AttributeType.TENSOR:
                    put("t", key, *tensor_key(attr.as_tensor()))
                else:
                    put("a", key, attr.value)

    for one in companions.family(model):
        put(sorted(one.opset_imports.items()), one.ir_version)
        graph_key(one.graph)
        for identifier, function in sorted(one.functions.items()):
            put("f", identifier)
            graph_key(function.graph)
    if (attached := companions.of(model)) is not None:
        put("companions", attached.plan(dict.fromkeys(attached.graphs, "")))
    return state.hexdigest()
