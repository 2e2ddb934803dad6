"""Adapters on a stage that passes made: what they did to a weight is done to its update.

Each of a stage's weights has an origin (``sdopt.origins``). Casts, concatenations, reshapes,
transposed layouts and sums are linear: the update of ``concat(q, k, v)`` is the concatenation of
the updates of q, k and v. So nothing but the stage itself is needed, a packed one too, and an
adapter that was merged into it before stays in it. What is not linear (integers of a
quantization) cannot be updated and is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sdopt import companions, modelfile, origins, weights
from sdopt.adapters import MERGED_KEY, matching, merging
from sdopt.adapters.requests import Lora
from sdopt.errors import BundleError, UsageError, WeightsError
from sdopt.manifest import read_object
from sdopt.origins import Constant, Leaf, Made, Origin

Replaced = dict[str, dict[str, ir.TensorProtocol]]
"""Of each companion, and of the main graph under ``""``: initializer to the tensor to load."""

_MERGE = "merge it before such passes: sdopt optimize --from model --passes lora=FILE,..."


def replay(
    model: ir.Model, loras: Sequence[Lora], role: str, config: Mapping[str, Any], where: str
) -> Replaced:
    """The weights of a stage that the adapters change, each computed in blocks when it is read.

    Adapters for another component, and those of scale 0, change nothing.

    Args:
        model: the stage, with its companions, as ``modelfile.load`` gives it.
        loras: which adapters.
        role: the component's role, as in its record.
        config: the component's ``config.json``.
        where: the stage, for errors.

    Raises:
        WeightsError: keys or shapes that do not fit, as with the pass ``lora``; a weight whose
            making cannot be replayed.
        BundleError: the stage does not say where its weights came from.
        UsageError: an adapter that is in the stage already.
    """
    loras = _not_merged_yet(model, loras, where)
    known = origins.known(model)
    if known is None:
        raise BundleError(
            "this stage does not say where its weights came from",
            where=where,
            why="it was written by an sdopt that did not record it",
            hint=f"make the stage again, as it was made; or {_MERGE}",
        )
    tables = known.tables
    _refuse_unknown(tables, where)
    leaves = {leaf for table in tables for one in table.values() for leaf in origins.leaves(one)}
    places = matching.by_path(sorted(leaves, key=lambda leaf: leaf.name))
    changes: dict[str, list[merging.Update]] = {}
    for lora in loras:
        chosen = matching.choose(lora.adapters, places, role, config)
        pairs = matching.pair(chosen, places, lora.adapters, str(lora.path))
        for leaf, update in merging.updates(pairs, lora.scale, lora.digest, str(lora.path)):
            if lora.scale:
                changes.setdefault(leaf.name, []).append(update)
    replaced: Replaced = {}
    graphs = {"": model, **companions.graphs(model)}
    for (name, one), table in zip(graphs.items(), tables, strict=True):
        found = _changed(one, table, changes, where)
        if found:
            replaced[name] = found
    return replaced


def _not_merged_yet(model: ir.Model, loras: Sequence[Lora], where: str) -> list[Lora]:
    """The adapters that are not in the stage; one that is, at the same scale, is left out."""
    text = model.metadata_props.get(MERGED_KEY)
    merged = read_object(text, where) if text else {}
    for lora in loras:
        if lora.digest in merged and merged[lora.digest] != lora.scale:
            raise UsageError(
                "this adapter was merged already, at another scale",
                where=str(lora.path),
                why=f"{where} holds it at scale {merged[lora.digest]:g}; "
                f"{lora.scale:g} was asked for",
                hint="run a stage without it: --stage NAME",
            )
    return [lora for lora in loras if lora.digest not in merged]


def _refuse_unknown(tables: Sequence[origins.Table], where: str) -> None:
    for table in tables:
        for name, origin in table.items():
            if origins.is_unknown(origin):
                raise WeightsError(
                    f"{name}: nothing tells which weights it was made of",
                    where=where,
                    why="a tool outside sdopt computed it (simplify, graphsurgeon, a pass of "
                    "another package), and an adapter may belong into it",
                    hint=_MERGE,
                )


def _changed(
    model: ir.Model,
    table: origins.Table,
    changes: Mapping[str, list[merging.Update]],
    where: str,
) -> dict[str, ir.TensorProtocol]:
    found: dict[str, ir.TensorProtocol] = {}
    for value in modelfile.initializers(model):
        name, tensor = value.name or "", value.const_value
        origin = table.get(name)
        if tensor is None or origin is None:
            continue
        if any(leaf.name in changes for leaf in origins.leaves(origin)):
            wide = ir.DataType.FLOAT
            if tensor.dtype == ir.DataType.DOUBLE:
                wide = ir.DataType.DOUBLE
            found[name] = _sum(tensor, _update(origin, name, changes, wide, where), name)
    return found


def _update(
    origin: Origin,
    name: str,
    changes: Mapping[str, list[merging.Update]],
    wide: ir.DataType,
    where: str,
) -> ir.TensorProtocol:
    """What is added to a weight of that origin, in the ``wide`` type."""
    match origin:
        case Leaf(leaf, shape):
            if leaf in changes:
                return merging.total(shape, changes[leaf], wide, leaf)
            return weights.full(shape, 0.0, wide)
        case Constant(shape):
            return weights.full(shape, 0.0, wide)
        case Made(how, of, options):
            rule = _LINEAR.get(how)
            if rule is None:
                from_ = ", ".join(leaf.name for leaf in origins.leaves(origin))
                raise WeightsError(
                    f"{name}: no adapter can be applied to it any more",
                    where=where,
                    why=f"{how} made it of {from_}, and an update does not pass through that",
                    hint=_MERGE,
                )
            parts = [_update(one, name, changes, wide, where) for one in of]
            return rule(parts, dict(options))


Rule = Callable[[list[ir.TensorProtocol], dict[str, Any]], ir.TensorProtocol]

_LINEAR: Mapping[str, Rule] = {
    "cast": lambda parts, _: parts[0],
    "lora": lambda parts, _: parts[0],
    "add": lambda parts, _: weights.add(parts[0], parts[1]),
    "concat": lambda parts, options: weights.concat(parts, options["axis"]),
    "reshape": lambda parts, options: weights.reshape(parts[0], options["shape"]),
    "transpose": lambda parts, _: weights.transpose(parts[0]),
    "channels_last": lambda parts, _: weights.channels_last(parts[0]),
}
"""Operations of ``sdopt.weights`` that pass an update on, whatever the weight itself is."""


def _sum(stored: ir.TensorProtocol, update: ir.TensorProtocol, name: str) -> weights.BlockTensor:
    """A stage's weight and its update, added up in the wide type and rounded once."""
    wide = update.dtype.numpy()
    step = weights.BLOCK_BYTES // wide.itemsize

    def blocks() -> weights.Blocks:
        before = weights.rechunk(weights.read_blocks(stored), step)
        after = weights.rechunk(weights.read_blocks(update), step)
        for block, more in zip(before, after, strict=True):
            total = block.astype(wide)
            total += more
            yield merging.rounded(total, stored.dtype, name, "FILE:0.5")

    recipe = weights.Recipe("add", (stored, update))
    return weights.BlockTensor(blocks, stored.dtype, stored.shape.numpy(), name, recipe)
