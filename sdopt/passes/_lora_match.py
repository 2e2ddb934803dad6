"""Which weight of a graph each adapter of a file is for."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sdopt.errors import WeightsError
from sdopt.passes._lora_file import Adapter, Part, flat
from sdopt.passes.base import Role

Weights = Mapping[str, Sequence[ir.Value]]
"""Flat module path (dots as underscores, as kohya writes them) to the weights of that name."""

_SUFFIX = ".weight"
_FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
_ORIGINAL = ("input_blocks", "output_blocks", "middle_block")
_SHOWN = 3
_NEAR = 2


def weights_of(model: ir.Model) -> Weights:
    """The weight matrices and kernels of a graph by the name that adapters call them."""
    found: dict[str, list[ir.Value]] = defaultdict(list)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) >= 2:
            found[flat(name.removesuffix(_SUFFIX))].append(value)
    return found


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


def choose(
    adapters: Sequence[Adapter], weights: Weights, role: Role, config: Mapping[str, Any]
) -> list[Adapter]:
    """The adapters of the component that is being rewritten.

    A second text encoder is known by its projection. A single file of which nothing is known is
    the component that has most of the names.
    """
    if role is Role.DENOISER:
        part = Part.DENOISER
    elif role is Role.TEXT_ENCODER:
        second = any("WithProjection" in name for name in config.get("architectures") or ())
        part = Part.TEXT_ENCODER_2 if second else Part.TEXT_ENCODER
    else:
        hits = Counter(one.part for one in adapters if flat(one.path) in weights)
        parts = hits or Counter(one.part for one in adapters)
        part = parts.most_common(1)[0][0]
    return [one for one in adapters if one.part is part]


def pair(
    adapters: Sequence[Adapter], weights: Weights, everything: Sequence[Adapter], where: str
) -> list[tuple[ir.Value, Adapter]]:
    """Each adapter with its weight; ``everything`` is the whole file, to tell what it is for.

    Raises:
        WeightsError: an adapter has no weight, or two, or two adapters have the same one.
    """
    pairs: list[tuple[ir.Value, Adapter]] = []
    missing: list[Adapter] = []
    taken: dict[ir.Value, Adapter] = {}
    for one in adapters:
        found = weights.get(flat(one.path), ())
        exact = [value for value in found if value.name == one.path + _SUFFIX]
        candidates = exact or found
        if not candidates:
            missing.append(one)
            continue
        if len(candidates) > 1:
            names = " and ".join(str(value.name) for value in candidates)
            raise WeightsError(f"{one.key} could be either of {names}", where=where)
        value = candidates[0]
        if (other := taken.setdefault(value, one)) is not one:
            raise WeightsError(
                f"the adapter changes {value.name} twice",
                where=where,
                why=f"{other.key} and {one.key} are two spellings of it",
            )
        pairs.append((value, one))
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
        names = [str(weights[name][0].name).removesuffix(_SUFFIX) for name in close]
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
