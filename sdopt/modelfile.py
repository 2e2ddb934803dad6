"""One ONNX file on disk, with its companions: opened without weights, saved by one rename."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from sdopt import companions, datafile, onnx_metadata, origins, wellformed
from sdopt.errors import BundleError, WeightsError
from sdopt.weights import INLINE_BYTES, check_location, identity

DIGEST_LENGTH = 16

_VENDORS = "sdopt.vendors"
"""Where the checker sees operators that only a vendor's compiler knows."""


@dataclass(frozen=True)
class Saved:
    """What a save left: the file's digest and the bytes of new weights beside it."""

    digest: str
    bytes_written: int


def load(path: Path) -> ir.Model:
    """Open an ONNX file and its companions; weights stay ranges of files, checked to be there.

    Raises:
        BundleError: no such file, not an ONNX file, or a graph that nothing could run: a cycle,
            a value that is made twice or never, a tensor of another size than its shape; a
            companion is missing or another's.
        WeightsError: external data that is missing, short, or outside the folder.
    """
    model = _load_one(path, "no such ONNX file", None)
    text = model.metadata_props.get(companions.PLAN_KEY)
    if text is not None:
        plan, graphs = companions.Plan.loads(text, str(path)), {}
        for one in plan.graphs:
            graphs[one.name] = _load_one(
                path.with_name(one.file),
                f"the companion {one.name!r} of a graph is missing",
                f"copy it with {path.name}; sdopt pack copies all that belongs together",
            )
        companions.adopt(model, plan, graphs)
    origins.attach(model, list(companions.family(model)), str(path))
    return model


def metadata(path: Path) -> dict[str, str]:
    """An ONNX file's own metadata; in one that sdopt wrote nothing else is looked at.

    Raises:
        BundleError: no such file, or not an ONNX file.
    """
    found = onnx_metadata.ours(path)
    return (
        dict(_parsed(path, "no such ONNX file", None).metadata_props) if found is None else found
    )


def _load_one(path: Path, missing: str, hint: str | None) -> ir.Model:
    model = _parsed(path, missing, hint)
    for value in initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            check_location(value.const_value)
    return model


def _parsed(path: Path, missing: str, hint: str | None) -> ir.Model:
    proto = wellformed.read(path, missing, hint)
    wellformed.refuse_what_would_be_lost(proto, str(path))
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise BundleError(
            "this file holds no valid graph",
            where=str(path),
            why=_innermost(error)[:400],
            hint="export it again, or correct what wrote it",
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    wellformed.check_sizes(model, str(path))
    wellformed.sort_nodes(model, str(path))
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
    """Write ``model`` to ``path``: new weights first, then companions, then the graph's rename.

    Weights that already lie in the folder stay where they are; ranges of files elsewhere are
    copied by the kernel; computed tensors are streamed, each once however many graphs hold it.
    A kill at any moment leaves the previous file of that name whole, with its data and its
    companions, whose names carry their digests.

    Raises:
        StorageError: the disk is full or the folder is not writable.
        WeightsError: a weight's source is missing or short.
    """
    origins.describe(model, companions.family(model))
    count = _write_weights(model, path)
    attached, files = companions.of(model), {}
    for name, one in companions.graphs(model).items():
        data = _serialized(one, path)
        files[name] = companions.file_name(path.stem, name, digest_of(data))
        datafile.write_bytes(path.with_name(files[name]), data)
    model.metadata_props.pop(companions.PLAN_KEY, None)
    if attached is not None and attached.graphs:
        model.metadata_props[companions.PLAN_KEY] = attached.plan(files).dumps()
    data = _serialized(model, path)
    datafile.write_bytes(path, data)
    return Saved(digest_of(data), count)


def _write_weights(model: ir.Model, path: Path) -> int:
    """Let every weight of a model and its companions be a range in the folder; bytes written."""
    folder = path.parent
    pending: dict[Hashable, ir.TensorProtocol] = {}
    holders: list[tuple[ir.Value, Hashable]] = []
    for value in (value for one in companions.family(model) for value in initializers(one)):
        tensor = value.const_value
        if tensor is None:
            raise WeightsError(f"the initializer {value.name} has no value", where=str(path))
        if isinstance(tensor, ir.ExternalTensor) and _inside(tensor, folder):
            value.const_value = _rebased(tensor, folder)
        elif tensor.nbytes > INLINE_BYTES:
            key = identity(tensor)
            pending.setdefault(key, tensor)
            holders.append((value, key))
        elif not isinstance(tensor, (ir.Tensor, ir.TensorProtoTensor, ir.StringTensor)):
            value.const_value = ir.Tensor(
                tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name
            )
    written, count = datafile.write(list(pending.values()), folder, path.stem)
    ranges = dict(zip(pending, written, strict=True))
    for value, key in holders:
        value.const_value = _named(ranges[key], value.name or "", folder)
    return count


def _named(tensor: ir.ExternalTensor, name: str, folder: Path) -> ir.ExternalTensor:
    """The same range under another name: a tensor has the name of the value that holds it."""
    if tensor.name == name:
        return tensor
    return _range(tensor, str(tensor.location), name, folder)


def _serialized(model: ir.Model, path: Path) -> bytes:
    try:
        return ir.to_proto(model).SerializeToString(deterministic=True)
    except ir.serde.SerdeError as error:
        raise BundleError(
            "this graph holds something that can be read and not written",
            where=str(path),
            why=_innermost(error)[:400],
            hint="correct what wrote the file that it came from",
        ) from error
    except (EncodeError, ValueError) as error:
        raise WeightsError(
            "the graph itself passes protobuf's 2 GiB limit", where=str(path), why=str(error)
        ) from error


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


def check(model: ir.Model, vendor_ops: Collection[str] = ()) -> None:
    """Run onnx's checker on the graph, with its weights declared as inputs.

    The checker knows neither computed tensors nor the folder that a file range is relative to
    (onnx 1.23), and it need not see weights to check a graph. It refuses unknown operators of the
    standard domain; those in ``vendor_ops`` it sees in a domain of their own, about which it asks
    nothing.

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
        proto = ir.to_proto(model)
        if vendor_ops:
            _move(proto.graph, vendor_ops)
            proto.opset_import.add(domain=_VENDORS, version=1)
        onnx.checker.check_model(proto)
    finally:
        for value in [v for v in one.inputs if v not in overridable]:
            one.inputs.remove(value)
        one.initializers.clear()
        one.initializers.update(kept)


def _move(one: onnx.GraphProto, names: Collection[str]) -> None:
    """Put the nodes of those operators, also in subgraphs, into a domain of their own."""
    for node in one.node:
        if node.op_type in names and node.domain in ("", "ai.onnx"):
            node.domain = _VENDORS
        for body in [body for attr in node.attribute for body in (attr.g, *attr.graphs)]:
            _move(body, names)


def files_of(path: Path) -> set[str]:
    """The names of the files beside an ONNX file that it needs: weights and companions."""
    model = ir.load(path)
    text = model.metadata_props.get(companions.PLAN_KEY)
    plan = companions.Plan.loads(text, str(path)).graphs if text else ()
    found = {one.file for one in plan}
    for one in [model, *(ir.load(path.with_name(name)) for name in sorted(found))]:
        tensors = (value.const_value for value in initializers(one))
        found |= {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    return found


def remove_orphans(path: Path) -> None:
    """Remove files of the stage at ``path`` that no ONNX file in its folder needs any more."""
    folder, used = path.parent, files_of(path)
    kinds = (datafile.is_data_name, companions.is_file_name)
    names = {p.name for p in folder.iterdir() if any(kind(p.name, path.stem) for kind in kinds)}
    if not names - used:
        return
    for other in folder.glob("*.onnx"):
        if not companions.is_file_name(other.name):
            used |= files_of(other)
    for name in names - used:
        (folder / name).unlink(missing_ok=True)


def _inside(tensor: ir.ExternalTensor, folder: Path) -> bool:
    return os.path.realpath(tensor.path).startswith(os.path.join(os.path.realpath(folder), ""))


def _rebased(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    """The same range, its location relative to ``folder`` and nothing but offset and length."""
    check_location(tensor)
    place = os.path.relpath(os.path.realpath(tensor.path), os.path.realpath(folder))
    return _range(tensor, place, tensor.name or "", folder)


def _range(tensor: ir.ExternalTensor, place: str, name: str, folder: Path) -> ir.ExternalTensor:
    held = (tensor.offset or 0, tensor.nbytes, tensor.dtype)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(place, *held, shape=shape, name=name, base_dir=folder)
