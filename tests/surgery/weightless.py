"""Graphs without their weights: what is a module's parameter becomes a reference to its recipe.

Everything else (scales, shapes, masks, tables, zeros that an exporter folded) is kept as it is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from tests.surgery.parameters import parameter

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)

SMALLEST = 2
"""Tensors of fewer elements are never taken for a parameter."""


def strip(model: onnx.ModelProto, parameters: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """``model`` without its parameters, and without what exporters note about its source.

    Each initializer that holds the values of a parameter, reshaped or transposed, is left
    without data; its ``external_data`` says which parameter and how.
    """
    known = {
        _digest(array.astype(dtype)): name
        for name, array in parameters.items()
        for dtype in {np.dtype(np.float32), array.dtype}
    }
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    _forget_sources(slim)
    for tensor in _tensors(slim.graph):
        if tensor.data_type not in _FLOATS:
            continue
        array = numpy_helper.to_array(tensor)
        name = known.get(_digest(array)) if array.size >= SMALLEST else None
        if name is not None:
            source = parameters[name]
            entries = {"location": name, **_layout(array, source)}
            if array.dtype != source.dtype:
                # Torch 2.13 makes float32 of some half modules whose mask is float32.
                entries["rounded"] = source.dtype.name
            dims, kind, own = list(tensor.dims), tensor.data_type, tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type = own, kind
            tensor.dims.extend(dims)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
    return slim


def fill(slim: onnx.ModelProto) -> None:
    """Draw the parameters of a stripped model again, in place."""
    for tensor in _tensors(slim.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        source = _numbers(entries["shape"])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        drawn = parameter(entries["location"], source, np.dtype(entries.get("rounded", dtype)))
        array = drawn.astype(dtype)
        array = array.transpose(_numbers(entries["perm"])).reshape(tuple(tensor.dims))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = np.ascontiguousarray(array).tobytes()


def elements(slim: onnx.ModelProto) -> tuple[int, int]:
    """How many float elements a stripped model holds, and how many it refers to.

    A tensor of one value throughout (``baddbmm``'s zeros of [B * heads, S, S]) holds one.
    """
    held = referred = 0
    for tensor in _tensors(slim.graph):
        size = int(np.prod(tensor.dims))
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            referred += size
        elif tensor.data_type in _FLOATS:
            array = numpy_helper.to_array(tensor)
            held += min(size, 1) if (array == array.flat[:1]).all() else size
    return held, referred


def structure(slim: onnx.ModelProto) -> str:
    """Digest of a stripped model's nodes, attributes, tensors and interface, without names.

    Of floats that are no parameters, single ones count by value and more by shape: exporters
    compute tables, and ``exp`` is not the same in the last bit on every processor.
    """
    found = hashlib.sha256()
    for part in _described(slim.graph):
        found.update(repr(part).encode())
    opsets = sorted((one.domain, one.version) for one in slim.opset_import)
    found.update(repr((opsets, len(slim.functions))).encode())
    return found.hexdigest()


def _described(graph: onnx.GraphProto) -> Iterator[object]:
    numbers: dict[str, int] = {"": -1}
    for value in graph.input:
        numbers[value.name] = len(numbers)
        yield value.name, value.type.SerializeToString(deterministic=True)
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name not in numbers:
                numbers[name] = len(numbers)
                yield _content(held[name]) if name in held else name
        yield node.domain, node.op_type, [numbers[name] for name in node.input]
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.name, _content(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.name, list(_described(attribute.g))
            else:
                yield attribute.SerializeToString(deterministic=True)
        for name in node.output:
            numbers[name] = len(numbers)
    yield [(value.name, numbers.get(value.name)) for value in graph.output]


def _content(tensor: onnx.TensorProto) -> object:
    shape = tensor.data_type, list(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return shape, sorted((entry.key, entry.value) for entry in tensor.external_data)
    array = numpy_helper.to_array(tensor)
    return shape if tensor.data_type in _FLOATS and array.size > 1 else (shape, array.tolist())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _layout(array: np.ndarray, source: np.ndarray) -> dict[str, str]:
    """How ``array`` lays out the parameter ``source``."""
    for perm in itertools.permutations(range(source.ndim)):
        if np.array_equal(source.transpose(perm).ravel(), array.ravel()):
            shape, order = ([str(n) for n in numbers] for numbers in (source.shape, perm))
            return {"shape": ",".join(shape), "perm": ",".join(order)}
    raise ValueError(f"a parameter of shape {source.shape} in no order that transposing gives")


def _digest(array: np.ndarray) -> bytes:
    """Equal for arrays of the same values in any order."""
    return hashlib.sha256(np.sort(array, axis=None).tobytes()).digest()


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for one in _graphs(graph):
        yield from one.initializer
        for node in one.node:
            yield from (a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)


def _forget_sources(model: onnx.ModelProto) -> None:
    """Drop stack traces and documentation: they hold paths of the machine that exported."""
    for holder in _holders(model):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")


def _holders(model: onnx.ModelProto) -> Iterable[onnx.ModelProto]:
    yield model
    yield from model.functions
    for graph in _graphs(model.graph):
        yield graph
        yield from itertools.chain(
            graph.node, graph.value_info, graph.input, graph.output, graph.initializer
        )
