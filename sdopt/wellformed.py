"""What an ONNX file must be before a pass sees it: complete, acyclic, each tensor its own size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from sdopt import graph
from sdopt.errors import BundleError

PARSED = 2**31 - 1
"""Bytes that protobuf parses at most."""

_LATEST = 25
"""The latest opset that ``lower_opset`` writes."""

_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


_AXES = 64
"""Of a tensor at most: numpy's own limit."""


def read(path: Path, missing: str, hint: str | None) -> onnx.ModelProto:
    """The message in an ONNX file; ``missing`` and ``hint`` are for the error if there is none.

    Raises:
        BundleError: no such file, not an ONNX file, or one that passes 2 GiB.
    """
    try:
        _refuse_what_is_too_large(path)
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise BundleError(missing, where=str(path), hint=hint) from error
    except (OSError, DecodeError, ValueError, TypeError, KeyError) as error:
        raise BundleError(
            "this is not an ONNX file, or it is cut short",
            where=str(path)[:400],
            why=str(error)[:400],
            hint="export or copy it again",
        ) from error


def _refuse_what_is_too_large(path: Path) -> None:
    """Refuse a file that protobuf does not parse, before a byte of it is read."""
    if (size := path.stat().st_size) > PARSED:
        raise BundleError(
            "this ONNX file is larger than 2 GiB, and no reader of ONNX can parse that",
            where=str(path),
            why=f"it has {size / 1e9:.2f} GB, and protobuf ends at 2 GiB: other tools then say "
            "that ir_version or opset_import is not set",
            hint="write it again with its weights beside it: onnx.save(model, FILE, "
            "save_as_external_data=True), or torch.onnx.export(..., external_data=True)",
        )


def opset_of_version(version: int, opset: int) -> int:
    """The latest opset, up to ``opset``, that a file of that IR version can be of."""
    for one in range(min(opset, _LATEST), 0, -1):
        known: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", one)])
        if known <= version:
            return one
    return opset


def refuse_what_would_be_lost(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what onnx-ir 1.1 reads as if it were not there, and names that it cannot write.

    Raises:
        BundleError: the graph, or a body in it, holds sparse initializers or names that are no
            UTF-8.
    """
    stack = [proto.graph]
    _refuse_bytes((proto.producer_name, proto.producer_version, proto.domain), where)
    _refuse_bytes((one.domain for one in proto.opset_import), where)
    _refuse_bytes((e.key for e in proto.metadata_props), where)
    _refuse_bytes((e.value for e in proto.metadata_props), where)
    for function in proto.functions:
        _refuse_bytes((function.name, function.domain, *function.input, *function.output), where)
        stack.append(onnx.GraphProto(node=function.node))
    while stack:
        one = stack.pop()
        _refuse_bytes(_names(one), where)
        if one.sparse_initializer:
            raise BundleError(
                f"the weight {one.sparse_initializer[0].values.name} is a sparse initializer",
                where=where,
                why="sparse initializers are not supported",
                hint="store it as a dense initializer, or as a Constant node",
            )
        for node in one.node:
            for attr in node.attribute:
                if not attr.type and not attr.ref_attr_name:
                    raise BundleError(
                        f"the attribute {attr.name[:80]} of a {node.op_type} has no type",
                        where=where,
                        hint="the file is damaged, or a faulty tool wrote it: export it again",
                    )
                stack.extend(attr.graphs)
                if attr.HasField("g"):
                    stack.append(attr.g)


def _names(one: onnx.GraphProto) -> Iterator[str | bytes]:
    """Every name in a graph, without those in its bodies."""
    yield one.name
    for port in (*one.input, *one.output, *one.value_info):
        yield port.name
        yield from (dim.dim_param for dim in port.type.tensor_type.shape.dim)
    for tensor in one.initializer:
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for node in one.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (text for e in node.metadata_props for text in (e.key, e.value))
        for attr in node.attribute:
            yield from (attr.name, attr.ref_attr_name, attr.t.name)


def _refuse_bytes(names: Iterable[str | bytes], where: str) -> None:
    """Refuse names that protobuf gives as bytes, because they are no UTF-8."""
    for name in names:
        if not isinstance(name, str):
            raise BundleError(
                "a name in this graph is no UTF-8",
                where=where,
                why=repr(name[:80]),
                hint="the file is damaged or was written by a faulty tool: export it again",
            )


def check_sizes(model: ir.Model, where: str) -> None:
    """Check that each tensor inside the file holds as many numbers as its shape says.

    Raises:
        BundleError: naming the first that does not.
    """
    for name, tensor in _tensors(model):
        dims, dtype = tensor.shape.numpy(), _dtype(tensor)
        texts = isinstance(tensor, ir.ExternalTensor) and dtype == ir.DataType.STRING
        untyped = dtype == ir.DataType.UNDEFINED or texts  # text has no size in a data file
        if untyped or len(dims) > _AXES or min(dims, default=0) < 0:
            shown = str(list(dims[:_AXES]))
            raise BundleError(
                f"the tensor {name} is none: it has no type, or no shape that a tensor can have",
                where=where,
                why=f"its type is {dtype}, its shape {shown[:200]}",
                hint="the file is damaged or was written by a faulty tool: export it again",
            )
        if isinstance(tensor, ir.StringTensor):
            found, wanted, unit = len(tensor.string_data()), math.prod(dims), "texts"
        elif isinstance(tensor, ir.TensorProtoTensor):
            found, wanted, unit = _sizes(tensor)
        else:
            continue
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
                    # as_tensor() asks isinstance of a Protocol, which asks the type for its size.
                    yield graph.module_path(node), attr.value


def _dtype(tensor: ir.TensorProtocol) -> ir.DataType:
    """A tensor's type; a number that stands for none is as good as no type."""
    try:
        return tensor.dtype
    except ValueError:
        return ir.DataType.UNDEFINED


def _sizes(tensor: ir.TensorProtoTensor) -> tuple[int, int, str]:
    """What a tensor holds, what its shape needs, and in which unit that is counted."""
    proto, count = tensor.raw, math.prod(tensor.shape.numpy())
    if proto.HasField("raw_data"):
        return len(proto.raw_data), math.ceil(count * tensor.dtype.bitwidth / 8), "bytes"
    held = sum(len(getattr(proto, name)) for name in _TYPED)
    if tensor.dtype.bitwidth < 8:
        # How these are packed differs between writers.
        packed = math.ceil(count * tensor.dtype.bitwidth / 8)
        return held, held if held in (count, packed) else count, "numbers"
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
