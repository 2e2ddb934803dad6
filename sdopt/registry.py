"""Lazy tables from a word to the class behind it, and the plug-ins that add to them."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sdopt import spec
from sdopt.errors import SdoptError, UnknownNameError

PASSES: dict[str, str] = {
    "clean": "sdopt.passes.clean:Clean",
    "raise_ops": "sdopt.passes.raise_ops:RaiseOps",
    "fuse_qkv": "sdopt.passes.fuse_qkv:FuseQkv",
    "pad_align": "sdopt.passes.pad_align:PadAlign",
    "lora": "sdopt.passes.lora:Lora",
    "cast_bf16": "sdopt.passes.cast_bf16:CastBf16",
    "cast_fp16": "sdopt.passes.cast_fp16:CastFp16",
    "cast_fp32": "sdopt.passes.cast_fp32:CastFp32",
    "cfg_parallel": "sdopt.passes.cfg_parallel:CfgParallel",
    "quantize": "sdopt.passes.quantize:Quantize",
    "tome": "sdopt.passes.tome:Tome",
    "hoist": "sdopt.passes.hoist:Hoist",
    "deep_cache": "sdopt.passes.deep_cache:DeepCache",
    "quick_gelu": "sdopt.passes.quick_gelu:QuickGelu",
    "flash_attention": "sdopt.passes.flash_attention:FlashAttention",
    "lower_group_norm": "sdopt.passes.lower_group_norm:LowerGroupNorm",
    "fix_shapes": "sdopt.passes.fix_shapes:FixShapes",
    "lower_ascend": "sdopt.passes.lower_ascend:LowerAscend",
    "lift_scalars": "sdopt.passes.lift_scalars:LiftScalars",
    "lower_opset": "sdopt.passes.lower_opset:LowerOpset",
    "lower_attention": "sdopt.passes.lower_attention:LowerAttention",
    "lower_token_merging": "sdopt.passes.lower_token_merging:LowerTokenMerging",
    "lower_channels_last": "sdopt.passes.lower_channels_last:LowerChannelsLast",
    "fuse_skip_norm": "sdopt.passes.fuse_skip_norm:FuseSkipNorm",
    "fuse_shared_linears": "sdopt.passes.fuse_shared_linears:FuseSharedLinears",
    "fuse_geglu": "sdopt.passes.fuse_geglu:FuseGeglu",
    "simplify": "sdopt.passes.simplify:Simplify",
    "graphsurgeon": "sdopt.passes.graphsurgeon:Graphsurgeon",
}
"""Built-in passes: CLI word to ``module:Class``."""

TARGETS: dict[str, str] = {
    "onnx": "sdopt.targets.onnx:Onnx",
    "ort": "sdopt.targets.ort:Ort",
    "atc": "sdopt.targets.atc:Atc",
    "trt": "sdopt.targets.trt:Trt",
    "trt_rtx": "sdopt.targets.trt_rtx:TrtRtx",
    "tpu": "sdopt.targets.tpu:Tpu",
}
"""Built-in targets: CLI word to ``module:Class``."""

_BUILT_IN = {"passes": PASSES, "targets": TARGETS}


@cache
def table(kind: str) -> dict[str, str]:
    """Every name of a kind (``passes`` or ``targets``) with its ``module:Class``.

    Packages add names through the entry-point groups ``sdopt.passes`` and ``sdopt.targets``.

    Raises:
        SdoptError: two packages claim one name, or a plug-in claims a built-in one.
    """
    known = dict(_BUILT_IN[kind])
    owner = dict.fromkeys(known, "sdopt")
    for point in sorted(entry_points(group=f"sdopt.{kind}"), key=lambda p: p.name):
        if known.get(point.name, point.value) != point.value:
            raise SdoptError(
                f"two packages provide the {kind} name {point.name!r}",
                why=f"{owner[point.name]} and {_package(point)}",
                hint="uninstall one of them, or rename the plug-in's entry point",
            )
        known[point.name], owner[point.name] = point.value, _package(point)
    return known


def resolve(kind: str, name: str) -> Any:
    """The class behind ``name``, imported now.

    Raises:
        UnknownNameError: with the nearest known names.
        SdoptError: the plug-in that provides it cannot be imported.
    """
    known = table(kind)
    if name not in known:
        singular = {"passes": "pass", "targets": "target"}[kind]
        raise UnknownNameError(f"unknown {singular} {name!r}", hint=spec.suggest(name, known))
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if module.split(".")[0] == "sdopt":
            raise
        raise SdoptError(
            f"the plug-in behind {name!r} cannot be loaded",
            where=known[name],
            why=str(error),
            hint="reinstall or remove that package",
        ) from error


def make(kind: str, text: str) -> Any:
    """The one object that a spec such as ``ort:threads=2`` names.

    Raises:
        SpecError: text that cannot be read, several items, or a wrong option.
        UnknownNameError: with the nearest known names.
    """
    items = spec.parse(text)
    if len(items) != 1:
        raise spec.pointed("one at a time, please", text, (0, len(text)))
    return spec.bind(resolve(kind, items[0].name), items[0])


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
