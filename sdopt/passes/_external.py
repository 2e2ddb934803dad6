"""Hands a graph to a foreign tool with its weights left outside, and takes the result back."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sdopt import graph, modelfile, weights
from sdopt.errors import WeightsError
from sdopt.fingerprint import fingerprint
from sdopt.weights import BLOCK_BYTES, INLINE_BYTES, Blocks, BlockTensor, read_blocks

_MARK = "sdopt-stand-in-"
"""Start of the ``location`` of a stand-in, which looks like external data without any."""


class Outside:
    """A model as a proto in which weights are stand-ins: a name, a type, a shape and a number.

    A foreign tool may move, copy, rename or drop a stand-in; ``adopt`` puts the very tensor back.

    Attributes:
        proto: the model for the tool. Nodes without a name of their own have a temporary one,
            so that what the tool keeps of them can be told afterwards.
        tensors: what the stand-ins stand for, by number.
    """

    def __init__(
        self, model: ir.Model, keeps: Callable[[ir.TensorProtocol], bool] = lambda _: False
    ) -> None:
        """Only tensors that ``keeps`` says no to, and no strings, are left outside."""
        self.model = model
        self.tensors: list[ir.TensorProtocol] = []
        self._inline: dict[str, ir.TensorProtocol] = {}
        self._names: dict[str, ir.Node] = {}
        self._makers: dict[str, ir.Node] = {}
        held = {value: value.const_value for value in modelfile.initializers(model)}
        names = {node: node.name for node in graph.nodes(model)}
        self._original = names
        try:
            self._name_nodes(names)
            for value, tensor in held.items():
                if tensor is None or tensor.dtype == ir.DataType.STRING:
                    continue
                if not keeps(tensor):
                    value.const_value = self._stand_in(tensor)
                else:
                    self._inline[value.name or ""] = tensor
                    value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype)
            self.proto = ir.to_proto(model)
        finally:
            for value, tensor in held.items():
                value.const_value = tensor
            for node, name in names.items():
                node.name = name

    def add(self, tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
        """A stand-in, as a proto, for one more tensor."""
        stand_in = self._stand_in(tensor)
        stand_in.name = name
        return ir.to_proto(stand_in)

    def behind(self, proto: onnx.TensorProto) -> ir.TensorProtocol | None:
        """What a proto stands for, or None if it is no stand-in."""
        for entry in proto.external_data:
            if entry.key == "location" and entry.value.startswith(_MARK):
                return self.tensors[int(entry.value.removeprefix(_MARK))]
        return None

    def adopt(self, proto: onnx.ModelProto) -> bool:
        """Let the model be what the tool made of it; False if that is the graph it was.

        Nodes that the tool kept, by name or else by the value that they make, get their module
        path and other metadata back.

        Raises:
            onnx.checker.ValidationError: the tool's graph is not valid; the model is unchanged.
            WeightsError: it reads external data that is not the model's.
        """
        made = ir.from_proto(proto)
        for value in modelfile.initializers(made):
            now, then = value.const_value, self._inline.get(value.name or "")
            if isinstance(now, ir.ExternalTensor):
                value.const_value = self._resolve(now)
            elif now is not None and then is not None and equal(then, now.numpy()):
                value.const_value = then
            elif now is not None and now.dtype.is_floating_point():
                made_up = ir.Tensor(np.array(now.numpy()), dtype=now.dtype, name=now.name)
                value.const_value = _of_unknown_origin(made_up)
        for node in graph.nodes(made):
            self._restore(node)
        if fingerprint(made) == fingerprint(self.model):
            return False
        modelfile.check(made, graph.vendor_ops(self.model))
        model = self.model
        made.graph.metadata_props.update(model.graph.metadata_props)
        model.graph, model.ir_version = made.graph, made.ir_version
        model.functions.clear()
        model.functions.update(made.functions)
        return True

    def _stand_in(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        location = f"{_MARK}{len(self.tensors)}"
        self.tensors.append(tensor)
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(
            location, 0, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or ""
        )

    def _name_nodes(self, names: dict[ir.Node, str | None]) -> None:
        uses = Counter(names.values())
        for index, (node, name) in enumerate(names.items()):
            if not name or uses[name] > 1:
                node.name = f"sdopt-node-{index}"
            self._names[node.name or ""] = node
            self._makers.update((out.name, node) for out in node.outputs if out.name)

    def _resolve(self, found: ir.ExternalTensor) -> ir.TensorProtocol:
        location = str(found.location)
        if location.startswith(_MARK):
            return self.tensors[int(location.removeprefix(_MARK))]
        raise WeightsError(
            f"{found.name}: a weight that lies in another model's data file",
            where=location,
            hint="load its values before it is put into the graph",
        )

    def _restore(self, node: ir.Node) -> None:
        makers = (self._makers.get(out.name or "") for out in node.outputs)
        kept = self._names.get(node.name or "")
        if kept is not None:
            node.name, node.doc_string = self._original[kept], kept.doc_string
        if (origin := kept or next((m for m in makers if m is not None), None)) is not None:
            node.metadata_props.update(origin.metadata_props)


def decided_by(package: str, module: str | None = None) -> tuple[str, ...]:
    """What of others decides a result: a package's version, the digest of an imported module."""
    version = f"{package} {metadata.version(package)}"
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if path is None:
        return (version,)
    return (version, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16])


def is_small(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is one of those that live inside the ONNX file."""
    return tensor.nbytes <= INLINE_BYTES


def in_memory(array: np.ndarray) -> ir.TensorProtocol:
    """A tensor for an array that a tool made; a large one is written block by block."""
    if array.nbytes <= INLINE_BYTES or ir.DataType.from_numpy(array.dtype).bitwidth < 8:
        return _of_unknown_origin(ir.Tensor(array))
    return BlockTensor(lambda: _flat(array), ir.DataType.from_numpy(array.dtype), array.shape)


def _of_unknown_origin(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor, with a note on it unless it is a number, or integers such as a shape."""
    if tensor.dtype.is_floating_point() and tensor.size > 1:
        return weights.made_by(tensor, weights.UNKNOWN)
    return tensor


def equal(tensor: ir.TensorProtocol, array: np.ndarray) -> bool:
    """Whether an array holds exactly a tensor's bits; reads block by block."""
    if tensor.dtype.numpy() != array.dtype or tuple(tensor.shape.numpy()) != array.shape:
        return False
    flat, position = array.reshape(-1), 0
    for block in read_blocks(tensor):
        if block.tobytes() != flat[position : position + block.size].tobytes():
            return False
        position += block.size
    return True


def _flat(array: np.ndarray) -> Blocks:
    flat = array.reshape(-1)
    step = max(1, BLOCK_BYTES // array.itemsize)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def bodies(proto: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a graph's If, Loop and Scan nodes, not of those inside them."""
    for node in proto.node:
        for attr in node.attribute:
            if attr.type == attr.GRAPH:
                yield attr.g
            yield from attr.graphs
