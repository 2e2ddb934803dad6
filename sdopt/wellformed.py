"""What an ONNX file must be before a pass sees it: complete, acyclic, each tensor its own size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from sdopt import graph
from sdopt.errors import BundleError

_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def refuse_what_would_be_lost(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what onnx-ir 1.1 reads as if it were not there.

    Raises:
        BundleError: the graph, or a body in it, holds sparse initializers.
    """
    stack = [proto.graph]
    while stack:
        one = stack.pop()
        if one.sparse_initializer:
            raise BundleError(
                f"the weight {one.sparse_initializer[0].values.name} is a sparse initializer",
                where=where,
                why="sparse initializers are not supported",
                hint="store it as a dense initializer, or as a Constant node",
            )
        for node in one.node:
            for attr in node.attribute:
                stack.extend(attr.graphs)
                if attr.HasField("g"):
                    stack.append(attr.g)


def check_sizes(model: ir.Model, where: str) -> None:
    """Check that each tensor inside the file holds as many numbers as its shape says.

    Raises:
        BundleError: naming the first that does not.
    """
    for name, tensor in _tensors(model):
        if not isinstance(tensor, ir.TensorProtoTensor):
            continue
        found, wanted, unit = _sizes(tensor)
        if found != wanted:
            raise BundleError(
                f"the tensor {name} has another size than its shape {tensor.shape}",
                where=where,
                why=f"it holds {found} {unit}, and the shape needs {wanted}",
                hint="the file is damaged or was written by a faulty tool: export it again",
            )


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for one in model.graphs():
        for value in one.initializers.values():
            if value.const_value is not None:
                yield value.name or "", value.const_value
        for node in one:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield graph.module_path(node), attr.as_tensor()


def _sizes(tensor: ir.TensorProtoTensor) -> tuple[int, int, str]:
    """What a tensor holds, what its shape needs, and in which unit that is counted."""
    proto, dims = tensor.raw, tensor.shape.numpy()
    count = -1 if any(dim < 0 for dim in dims) else math.prod(dims)
    if proto.HasField("raw_data"):
        return len(proto.raw_data), math.ceil(count * tensor.dtype.bitwidth / 8), "bytes"
    held = sum(len(getattr(proto, name)) for name in _TYPED)
    if tensor.dtype.bitwidth < 8:
        return held, held, "numbers"  # how these are packed differs between writers
    if tensor.dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        count *= 2
    return held, count, "numbers"


def sort_nodes(model: ir.Model, where: str) -> bool:
    """Put each node behind those that it reads; False if they were in order already.

    ONNX demands that order, every pass relies on it, and some tools do not keep it.

    Raises:
        BundleError: a cycle, or a value that nothing makes.
    """
    late = [
        found
        for one in (model.graph, *(function.graph for function in model.functions.values()))
        if (found := _first_late(one, set(), where)) is not None
    ]
    if not late:
        return False
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.graph.sort()
    except ValueError as error:
        node, value = late[0]
        raise BundleError(
            f"the graph has a cycle: {graph.module_path(node)} reads {value.name!r}, "
            "which depends on it",
            where=where,
            hint="correct the graph that was exported: nothing can run it",
        ) from error
    return True


def _first_late(one: ir.Graph, made: set[ir.Value], where: str) -> tuple[ir.Node, ir.Value] | None:
    """The first node that reads a value before it is made; ``made`` grows with the graph."""
    made.update(one.inputs)
    made.update(one.initializers.values())
    for node in one:
        for body in graph.bodies(node):
            if (late := _first_late(body, made, where)) is not None:
                return late
        for value in node.inputs:
            if value is None or value in made:
                continue
            if value.producer() is not None:
                return node, value
            raise BundleError(
                f"{graph.module_path(node)} reads {value.name!r}, which nothing makes",
                where=where,
                why="it is no input, no initializer and no output of a node",
                hint="the file is damaged or was written by a faulty tool: export it again",
            )
        made.update(node.outputs)
    return None
