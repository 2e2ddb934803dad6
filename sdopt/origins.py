"""Where each weight of a stage came from: a weight of the raw stage, and what was done to it.

A stage keeps this in its ONNX metadata, a graph of its own for each companion. Nothing of it is
needed to run the stage; with it, an adapter that was trained on the checkpoint can be applied to
what the passes made of that (``sdopt.adapters``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sdopt.blocks import UNKNOWN as UNKNOWN_RECIPE
from sdopt.blocks import recipe_of
from sdopt.errors import BundleError
from sdopt.manifest import RECORD_KEY, StageRecord, read_object

ORIGINS_KEY = "sdopt.origins"
"""Metadata key of a graph: JSON, the name of each initializer to its origin."""

SCHEMA = 1
_KNOWN = "sdopt.origins"
_DEEPEST = 100
"""Operations within one another: a stage of a stage of a stage adds a few each."""


@dataclass(frozen=True)
class Leaf:
    """A weight of the raw stage under the name that the checkpoint gives it.

    ``inputs_first`` says that a MatMul reads it as it is: ``[in, out]``, where PyTorch has
    ``[out, in]``.
    """

    name: str
    shape: tuple[int, ...]
    inputs_first: bool = False


@dataclass(frozen=True)
class Constant:
    """Numbers that a pass wrote and no weight decides."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """The result of an operation of ``sdopt.blocks.Recipe``; ``unknown`` where nobody can tell."""

    how: str
    of: tuple[Origin, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


Origin = Leaf | Constant | Made
Table = Mapping[str, Origin]
"""The name of each initializer of a graph to its origin."""

UNKNOWN = Made("unknown")


def leaves(origin: Origin) -> Iterator[Leaf]:
    """The weights of the raw stage that an origin holds."""
    if isinstance(origin, Leaf):
        yield origin
    elif isinstance(origin, Made):
        for one in origin.of:
            yield from leaves(one)


def is_unknown(origin: Origin) -> bool:
    """Whether some part of it was made of nobody knows what."""
    return isinstance(origin, Made) and (origin == UNKNOWN or any(map(is_unknown, origin.of)))


class Known:
    """The origins of what lies in a stage, by place: passes may rename and move weights."""

    def __init__(self, graphs: Iterable[tuple[ir.Model, Table]]) -> None:
        self.tables: list[Table] = []
        self._ranges: dict[tuple[str, int], list[tuple[ir.ExternalTensor, Origin]]] = {}
        self._objects: dict[int, tuple[ir.TensorProtocol, Origin]] = {}
        self._real: dict[str, str] = {}
        for model, table in graphs:
            self.tables.append(table)
            for value in _initializers(model):
                tensor, origin = value.const_value, table.get(value.name or "")
                if tensor is None or origin is None:
                    continue
                self._objects[id(tensor)] = (tensor, origin)
                if isinstance(tensor, ir.ExternalTensor):
                    self._ranges.setdefault(self._place(tensor), []).append((tensor, origin))

    def of(self, tensor: ir.TensorProtocol) -> Origin:
        """The origin of a tensor in a graph that was made from the stage."""
        if id(tensor) in self._objects:
            return self._objects[id(tensor)][1]
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            return self._of_range(tensor, shape)
        if (recipe := recipe_of(tensor)) is None:
            return Constant(shape)
        if recipe is UNKNOWN_RECIPE:
            return UNKNOWN
        made = Made(recipe.how, tuple(map(self.of, recipe.of)), recipe.options)
        return made if any(leaves(made)) or is_unknown(made) else Constant(shape)

    def _of_range(self, tensor: ir.ExternalTensor, shape: tuple[int, ...]) -> Origin:
        found = [
            one
            for one in self._ranges.get(self._place(tensor), ())
            if (one[0].nbytes, one[0].dtype) == (tensor.nbytes, tensor.dtype)
        ]
        if not found:
            return UNKNOWN
        # Tied weights share one range: each keeps its own name where it still has it.
        then, origin = next((one for one in found if one[0].name == tensor.name), found[0])
        if tuple(then.shape.numpy()) == shape:
            return origin
        return Made("reshape", (origin,), (("shape", shape),))

    def _place(self, tensor: ir.ExternalTensor) -> tuple[str, int]:
        path = str(tensor.path)
        if path not in self._real:
            self._real[path] = os.path.realpath(path)
        return self._real[path], tensor.offset or 0


def known(model: ir.Model) -> Known | None:
    """The origins of a model's weights, or None where nothing is known of them."""
    found: Known | None = model.meta.get(_KNOWN)
    return found


def attach(model: ir.Model, family: Iterable[ir.Model], where: str) -> None:
    """Let a model that was read from disk know the origins of its weights and its companions'.

    Those of a raw stage (and of anyone's ONNX file) are its weights themselves; of a stage that
    an sdopt wrote before origins were recorded nothing is known.

    Raises:
        BundleError: the record cannot be read.
    """
    raw = _is_raw(model, where)
    found: list[tuple[ir.Model, Table]] = []
    for one in family:
        text = one.metadata_props.get(ORIGINS_KEY)
        if text is not None:
            found.append((one, _loads(text, one, where)))
        elif raw:
            found.append((one, {v.name or "": _leaf(v) for v in _initializers(one)}))
        else:
            return
    model.meta[_KNOWN] = Known(found)


def describe(model: ir.Model, family: Iterable[ir.Model]) -> None:
    """Write the origins of a model's weights, while they are what passes made, into its metadata.

    Where nothing is known nothing is written, and what an earlier stage said is removed.
    """
    found = known(model)
    for one in family:
        one.metadata_props.pop(ORIGINS_KEY, None)
        if found is not None:
            one.metadata_props[ORIGINS_KEY] = _dumps(found, one)


def _dumps(found: Known, one: ir.Model) -> str:
    table: dict[str, object] = {}
    for value in _initializers(one):
        if value.const_value is not None:
            origin = found.of(value.const_value)
            shape = tuple(int(size) for size in value.const_value.shape.numpy())
            as_it_was = origin == Leaf(value.name or "", shape)
            table[value.name or ""] = True if as_it_was else _to_json(origin, top=True)
    record = {"schema": SCHEMA, "weights": table}
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _is_raw(model: ir.Model, where: str) -> bool:
    """Whether no pass was at work: anyone's file, a raw stage, or one that nothing changed."""
    text = model.metadata_props.get(RECORD_KEY)
    if text is None:
        return True
    record = StageRecord.loads(text, where)
    return not record.source_stage or not any(step.changed for step in record.history)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _leaf(value: ir.Value) -> Leaf:
    shape = value.const_value.shape.numpy() if value.const_value is not None else ()
    return Leaf(value.name or "", tuple(int(size) for size in shape), inputs_first(value))


def inputs_first(value: ir.Value) -> bool:
    """Whether a weight lies as ``[in, out]``: a MatMul or Gemm reads it as it is."""
    return any(
        index == 1
        and (
            user.op_type == "MatMul"
            or (user.op_type == "Gemm" and not user.attributes.get_int("transB", 0))
        )
        for user, index in value.uses()
    )


def _loads(text: str, model: ir.Model, where: str) -> Table:
    table = read_object(text, where).get("weights")
    found: dict[str, Origin] = {}
    try:
        if not isinstance(table, dict):
            raise TypeError("it has no table of weights")  # noqa: TRY301
        for value in _initializers(model):
            name = value.name or ""
            if value.const_value is None or name not in table:
                continue
            shape = tuple(int(size) for size in value.const_value.shape.numpy())
            found[name] = _of_json(table[name], name, shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            "the record of where its weights came from cannot be read",
            where=where,
            why=f"{type(error).__name__}: {error}",
            hint="make the stage again from the one that it came from",
        ) from error
    return found


def _to_json(origin: Origin, top: bool = False) -> object:
    match origin:
        case Leaf(name, shape, first):
            return {"weight": name, "shape": shape} | ({"inputs_first": True} if first else {})
        case Constant(shape):
            return None if top else {"constant": shape}
        case Made(how, of, options):
            return {"how": how, "of": [_to_json(one) for one in of], **dict(options)}


def _of_json(data: Any, name: str, shape: tuple[int, ...], deep: int = 0) -> Origin:
    if deep > _DEEPEST:
        raise ValueError("it is nested too deep")
    if data is True:
        return Leaf(name, shape)
    if data is None:
        return Constant(shape)
    if "weight" in data:
        return Leaf(str(data["weight"]), _sizes(data["shape"]), bool(data.get("inputs_first")))
    if "constant" in data:
        return Constant(_sizes(data["constant"]))
    options = tuple((k, _frozen(v)) for k, v in data.items() if k not in ("how", "of"))
    operands = tuple(_of_json(one, "", (), deep + 1) for one in data["of"])
    return Made(str(data["how"]), operands, options)


def _sizes(data: Any) -> tuple[int, ...]:
    """A shape, which holds nothing but sizes."""
    if not all(type(size) is int and size >= 0 for size in data):
        raise ValueError(f"{str(data)[:80]} is no shape")
    return tuple(data)


def _frozen(data: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_frozen, data)) if isinstance(data, list) else data
