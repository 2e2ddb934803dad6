"""Which weight of a graph each adapter of a file is for."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sdopt.adapters.files import Adapter, Part, flat
from sdopt.errors import WeightsError
from sdopt.origins import Leaf, inputs_first

Weights = Mapping[str, Sequence[Leaf]]
"""Flat module path (dots as underscores, as kohya writes them) to the weights of that name."""

_SUFFIX = ".weight"
_TEXT_ENCODER, _UNKNOWN = "text encoder", "model"
"""Values of ``sdopt.passes.base.Role``."""
_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
_ORIGINAL = ("input_blocks", "output_blocks", "middle_block")
_SHOWN = 3
_NEAR = 2


def weights_of(model: ir.Model) -> Weights:
    """The weight matrices and kernels of a graph by the name that adapters call them."""
    found = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS:
            found.append(Leaf(name, tuple(tensor.shape.numpy()), inputs_first(value)))
    return by_path(found)


def by_path(leaves: Iterable[Leaf]) -> Weights:
    """Those of the weights that are matrices or kernels, by the name that adapters call them."""
    found: dict[str, list[Leaf]] = defaultdict(list)
    for one in leaves:
        if len(one.shape) >= 2:
            found[flat(one.name.removesuffix(_SUFFIX))].append(one)
    return found


def choose(
    adapters: Sequence[Adapter], weights: Weights, role: str, config: Mapping[str, Any]
) -> list[Adapter]:
    """The adapters of the component that is being rewritten, by the role in its record.

    A second text encoder is known by its projection. A single file of which nothing is known is
    the component that has most of the names.
    """
    if role == _TEXT_ENCODER:
        second = any("WithProjection" in name for name in config.get("architectures") or ())
        part = Part.TEXT_ENCODER_2 if second else Part.TEXT_ENCODER
    elif role != _UNKNOWN:
        # A role without a part (a VAE) has no adapters.
        return [one for one in adapters if one.part.value == role]
    else:
        hits = Counter(one.part for one in adapters if flat(one.path) in weights)
        parts = hits or Counter(one.part for one in adapters)
        part = parts.most_common(1)[0][0]
    return [one for one in adapters if one.part is part]


def pair(
    adapters: Sequence[Adapter], weights: Weights, everything: Sequence[Adapter], where: str
) -> list[tuple[Leaf, Adapter]]:
    """Each adapter with its weight; ``everything`` is the whole file, to tell what it is for.

    Raises:
        WeightsError: an adapter has no weight, or two, or two adapters have the same one.
    """
    pairs: list[tuple[Leaf, Adapter]] = []
    missing: list[Adapter] = []
    taken: dict[Leaf, Adapter] = {}
    for one in adapters:
        found = weights.get(flat(one.path), ())
        exact = [leaf for leaf in found if leaf.name == one.path + _SUFFIX]
        candidates = exact or found
        if not candidates:
            missing.append(one)
            continue
        if len(candidates) > 1:
            names = " and ".join(leaf.name for leaf in candidates)
            raise WeightsError(f"{one.key} could be either of {names}", where=where)
        leaf = candidates[0]
        if (other := taken.setdefault(leaf, one)) is not one:
            raise WeightsError(
                f"the adapter changes {leaf.name} twice",
                where=where,
                why=f"{other.key} and {one.key} are two spellings of it",
            )
        pairs.append((leaf, one))
    if missing:
        raise _unmatched(missing, len(adapters), weights, everything, where)
    return pairs


def _unmatched(
    missing: Sequence[Adapter],
    total: int,
    weights: Weights,
    everything: Sequence[Adapter],
    where: str,
) -> WeightsError:
    lines = []
    for one in missing[:_SHOWN]:
        close = difflib.get_close_matches(flat(one.path), list(weights), n=_NEAR, cutoff=0.5)
        names = [weights[name][0].name.removesuffix(_SUFFIX) for name in close]
        lines.append(f"{one.key}: {'nearest: ' + ', '.join(names) if names else 'nothing near'}")
    if len(missing) > _SHOWN:
        lines.append(f"and {len(missing) - _SHOWN} more")
    count = "none of them matches" if len(missing) == total else f"{len(missing)} do not match"
    return WeightsError(
        f"the file adapts {total} weights of this component, and {count} a weight of the graph",
        where=where,
        why="\n".join(lines),
        hint=_hint(missing, weights, everything),
    )


def _hint(missing: Sequence[Adapter], weights: Weights, everything: Sequence[Adapter]) -> str:
    if any(name.endswith(("_weight_float16", "_weight_bfloat16")) for name in weights) or any(
        "to_qkv" in name or "to_kv" in name or "qkv_proj" in name for name in weights
    ):
        return "merge before fuse_qkv and the casts: start from the raw stage (--from model)"
    if any(word in one.path for one in missing for word in _ORIGINAL):
        return (
            "these are names of the original UNet (input_blocks, ...), as kohya writes them for "
            "SDXL: take the adapter in diffusers' names, for the base of this model"
        )
    if any(one.part is Part.TEXT_ENCODER_2 for one in everything):
        return "the file holds a second text encoder too: it was made for SDXL"
    return "the adapter was made for another base model (SDXL, say, and not SD 1.5)"
