"""One ONNX file on disk: opened without its weights, saved by a single rename."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from sdopt import datafile, wellformed
from sdopt.errors import BundleError, WeightsError
from sdopt.weights import INLINE_BYTES, check_location

DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Saved:
    """What a save left: the file's digest and the bytes of new weights beside it."""

    digest: str
    bytes_written: int


def load(path: Path) -> ir.Model:
    """Open an ONNX file; weights stay ranges of their files, each checked to be there in full.

    Raises:
        BundleError: no such file, not an ONNX file, or a graph that nothing could run: a cycle,
            a value that is made twice or never, a tensor of another size than its shape.
        WeightsError: external data that is missing, short, or outside the folder.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise BundleError("no such ONNX file", where=str(path)) from error
    except (DecodeError, ValueError, TypeError, KeyError) as error:
        raise BundleError(
            "this is not an ONNX file, or it is cut short",
            where=str(path),
            why=str(error),
            hint="export or copy it again",
        ) from error
    wellformed.refuse_what_would_be_lost(proto, str(path))
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise BundleError(
            "this file holds no valid graph",
            where=str(path),
            why=_innermost(error),
            hint="export it again, or correct what wrote it",
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    wellformed.check_sizes(model, str(path))
    wellformed.sort_nodes(model, str(path))
    for value in initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            check_location(value.const_value)
    return model


def _innermost(error: BaseException) -> str:
    """What onnx-ir wraps, level by level, into errors that quote the whole graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer of the main graph and its subgraphs."""
    for graph in model.graphs():
        yield from graph.initializers.values()


def save(model: ir.Model, path: Path) -> Saved:
    """Write ``model`` to ``path``: new weights first, then the graph by one rename.

    Weights that already lie in the folder stay where they are; ranges of files elsewhere are
    copied by the kernel; computed tensors are streamed. A kill at any moment leaves the previous
    file of that name whole, with its data.

    Raises:
        StorageError: the disk is full or the folder is not writable.
        WeightsError: a weight's source is missing or short.
    """
    folder = path.parent
    pending: dict[int, ir.TensorProtocol] = {}
    holders: list[ir.Value] = []
    for value in initializers(model):
        tensor = value.const_value
        if tensor is None:
            raise WeightsError(f"the initializer {value.name} has no value", where=str(path))
        if isinstance(tensor, ir.ExternalTensor) and _inside(tensor, folder):
            value.const_value = _rebased(tensor, folder)
        elif tensor.nbytes > INLINE_BYTES:
            pending[id(tensor)] = tensor
            holders.append(value)
        elif not isinstance(tensor, (ir.Tensor, ir.TensorProtoTensor, ir.StringTensor)):
            value.const_value = ir.Tensor(
                tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name
            )
    tensors = list(pending.values())
    written, count = datafile.write(tensors, folder, path.stem)
    ranges = dict(zip(pending, written, strict=True))
    for value in holders:
        value.const_value = ranges[id(value.const_value)]
    try:
        data = ir.to_proto(model).SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise WeightsError(
            "the graph itself passes protobuf's 2 GiB limit", where=str(path), why=str(error)
        ) from error
    datafile.write_bytes(path, data)
    return Saved(digest_of(data), count)


def annotate(source: Path, target: Path, key: str, value: str) -> Saved:
    """Write ``source``'s own bytes to ``target``, with one entry of metadata behind them.

    In protobuf a message that follows another is merged into it, so not one byte of the graph is
    decoded and encoded anew: what onnx-ir does not know (training info, fields of a newer onnx)
    stays too. An entry of that key which is there already is replaced, which encodes anew.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    data = source.read_bytes()
    model = onnx.ModelProto.FromString(data)
    kept = [one for one in model.metadata_props if one.key != key]
    if len(kept) < len(model.metadata_props):
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        data = model.SerializeToString(deterministic=True)
    entry = onnx.ModelProto()
    entry.metadata_props.add(key=key, value=value)
    data += entry.SerializeToString()
    datafile.write_bytes(target, data)
    return Saved(digest_of(data), 0)


def has_data_files(model: ir.Model) -> bool:
    """Whether any of a model's weights lies outside its ONNX file."""
    return any(isinstance(v.const_value, ir.ExternalTensor) for v in initializers(model))


def digest_of(data: bytes) -> str:
    """The digest of an ONNX file's bytes; its data files' names carry their own."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]


def check(model: ir.Model) -> None:
    """Run onnx's checker on the graph, with its weights declared as inputs.

    The checker knows neither computed tensors nor the folder that a file range is relative to
    (onnx 1.23), and it need not see weights to check a graph.

    Raises:
        onnx.checker.ValidationError: the graph is not valid.
    """
    one = model.graph
    kept = dict(one.initializers)
    overridable = set(one.inputs)
    for name, value in kept.items():
        if not isinstance(value.const_value, ir.Tensor):
            del one.initializers[name]
            if value not in overridable:
                one.inputs.append(value)
    try:
        onnx.checker.check_model(ir.to_proto(model))
    finally:
        for value in [v for v in one.inputs if v not in overridable]:
            one.inputs.remove(value)
        one.initializers.clear()
        one.initializers.update(kept)


def data_files(path: Path) -> set[str]:
    """The names of the files that an ONNX file's weights lie in, relative to its folder."""
    model = ir.load(path)
    tensors = (value.const_value for value in initializers(model))
    return {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}


def remove_orphans(path: Path) -> None:
    """Remove data files of the stage at ``path`` that no ONNX file in its folder points into."""
    folder, used = path.parent, data_files(path)
    names = {p.name for p in folder.iterdir() if datafile.is_data_name(p.name, path.stem)}
    if not names - used:
        return
    for other in folder.glob("*.onnx"):
        used |= data_files(other)
    for name in names - used:
        (folder / name).unlink(missing_ok=True)


def _inside(tensor: ir.ExternalTensor, folder: Path) -> bool:
    return os.path.realpath(tensor.path).startswith(os.path.join(os.path.realpath(folder), ""))


def _rebased(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    """The same range, its location relative to ``folder`` and nothing but offset and length."""
    check_location(tensor)
    return ir.ExternalTensor(
        os.path.relpath(os.path.realpath(tensor.path), os.path.realpath(folder)),
        tensor.offset or 0,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        base_dir=folder,
    )
