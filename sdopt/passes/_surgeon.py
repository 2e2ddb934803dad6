"""What onnx-graphsurgeon 0.6 does not do: weights that stay outside, captured values, inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.errors import SdoptError
from sdopt.passes import _external

_LOST = ("TENSORS", "GRAPHS", "TYPE_PROTO", "TYPE_PROTOS", "SPARSE_TENSOR", "SPARSE_TENSORS")
"""Kinds of attributes that onnx-graphsurgeon 0.6 drops with a warning."""


class Weights:
    """Lends weights to a graphsurgeon graph and takes back the ones that a script changed.

    By itself graphsurgeon reads an external weight relative to the working directory, keeps it
    for good, and exports it with the mark of external data but no place, which cannot be loaded.
    """

    def __init__(self, gs: Any, outside: _external.Outside) -> None:
        self._gs = gs
        self._outside = outside
        self._lent = {tensor.name: tensor for tensor in outside.tensors}
        self._read: dict[int, tuple[np.ndarray, ir.TensorProtocol]] = {}

    def lend(self, surgeon: Any) -> None:
        """Let each constant of the graph load its weight when ``values`` is asked for."""
        for constant in self._constants(surgeon):
            if (tensor := self._behind(constant)) is not None:
                constant._values.load = partial(self._load, tensor)

    def take_back(self, surgeon: Any) -> None:
        """Put a stand-in into every constant: its own weight's, or that of a new array."""
        for constant in self._constants(surgeon):
            tensor = self._behind(constant)
            if tensor is None and isinstance(constant._values, np.ndarray):
                tensor = self._tensor(constant)
            if tensor is not None:
                # A proto of its own, since the export writes the constant's name into it, and
                # two constants may share one.
                proto = self._outside.add(tensor, constant.name)
                constant._values = self._gs.ir.tensor.LazyValues(proto)

    def _load(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """The values, writable; those of a file are mapped copy-on-write, not read."""
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and tensor.size:
            weights.check_location(tensor)
            array: np.ndarray = np.memmap(
                tensor.path, tensor.dtype.numpy(), "c", tensor.offset or 0, tensor.shape.numpy()
            )
        else:
            array = np.array(tensor.numpy())
            weights.release(tensor)
        self._read[id(array)] = (array, tensor)
        return array

    def _tensor(self, constant: Any) -> ir.TensorProtocol | None:
        """The weight that an array is, bit for bit, or a new tensor; None leaves it to the export.

        That is for arrays to be written in another type than their own, and for text.
        """
        array = constant._values
        if array.dtype.kind in "OUS" or constant.export_dtype != array.dtype:
            constant.data_location = None
            return None
        _, original = self._read.get(id(array), (None, self._lent.get(constant.name)))
        if original is not None and _external.equal(original, array):
            return original
        if not array.flags.c_contiguous:
            array = np.array(array, order="C")
        return _external.in_memory(array)

    def _behind(self, constant: Any) -> ir.TensorProtocol | None:
        proto = getattr(constant._values, "tensor", None)
        return self._outside.behind(proto) if isinstance(proto, onnx.TensorProto) else None

    def _constants(self, surgeon: Any) -> Iterator[Any]:
        """Every constant of the graph and of the bodies in it, once."""
        seen: set[int] = set()
        for one in (surgeon, *surgeon.subgraphs(recursive=True)):
            for tensor in one.tensors().values():
                if isinstance(tensor, self._gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def drop_captured_copies(proto: onnx.GraphProto, outer: Mapping[str, bytes]) -> None:
    """Remove from bodies the weights that they capture, which graphsurgeon copies into them."""
    own = {tensor.name: tensor.SerializeToString() for tensor in proto.initializer}
    kept = [t for t in proto.initializer if outer.get(t.name) != own[t.name]]
    if len(kept) < len(own):
        kept = [onnx.TensorProto.FromString(own[tensor.name]) for tensor in kept]
        del proto.initializer[:]
        proto.initializer.extend(kept)
    for body in _external.bodies(proto):
        drop_captured_copies(body, {**outer, **own})


def keep_optional_inputs(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Put back the inputs with a default value, which graphsurgeon takes for constants."""
    defaults = {tensor.name for tensor in before.initializer}
    left = {tensor.name for tensor in after.initializer}
    lost = [one for one in before.input if one.name in defaults & left]
    if lost:
        order = {one.name: index for index, one in enumerate(before.input)}
        inputs = sorted([*after.input, *lost], key=lambda one: order.get(one.name, len(order)))
        copies = [onnx.ValueInfoProto.FromString(one.SerializeToString()) for one in inputs]
        del after.input[:]
        after.input.extend(copies)


def refuse_what_would_be_lost(model: ir.Model) -> None:
    """Raise SdoptError where a node has an attribute that graphsurgeon would drop."""
    for node in graph.nodes(model):
        for attr in node.attributes.values():
            if not attr.is_ref() and attr.type.name in _LOST:
                raise SdoptError(
                    f"onnx-graphsurgeon would drop the attribute {attr.name} of a {node.op_type}",
                    where=graph.module_path(node),
                    why=f"it reads no attributes of the kind {attr.type.name}",
                    hint="this model cannot go through graphsurgeon: write a pass instead",
                )
