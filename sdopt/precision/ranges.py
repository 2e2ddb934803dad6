"""What a graph's values are in float32, against what a half type can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from sdopt.compare.stepping import Stepper, Values
from sdopt.precision.emulation import Halves

_LOWEST = np.finfo(np.float32).min

PIECE_NODES = 12
"""Nodes whose outputs are in memory at once: every one of them is looked at."""


@dataclass(frozen=True)
class Limits:
    """What a half type holds: the largest number, the smallest normal one, the smallest of all."""

    largest: float
    normal: float
    smallest: float


def limits_of(dtype: str) -> Limits:
    """Those of ``fp16`` (65504, 6.1e-5, 6.0e-8) or ``bf16``."""
    kind = np.float16 if dtype == "fp16" else ml_dtypes.bfloat16
    info = ml_dtypes.finfo(kind)  # type: ignore[no-untyped-call] # 0.5 has no hints for it
    return Limits(float(info.max), float(info.smallest_normal), float(info.smallest_subnormal))


@dataclass(frozen=True)
class Range:
    """The values that one node gives, over all samples.

    Attributes:
        value: the value's name.
        path: the node's module path.
        op: its operator.
        depth: its number in graph order.
        largest: the greatest magnitude.
        sample: number of the sample that it was in.
        beyond: how many elements half would make infinite.
        subnormal: the share of elements that half holds with fewer bits.
        lost: the share of elements that are not zero and half makes zero.
    """

    value: str
    path: str
    op: str
    depth: int
    largest: float
    sample: int
    beyond: int
    subnormal: float
    lost: float

    def overflows(self, limits: Limits) -> bool:
        """Whether half cannot hold its largest value."""
        return not self.largest <= limits.largest


def measure(
    proto: onnx.ModelProto, folder: Path, halves: Halves, feeds: Sequence[Values], limits: Limits
) -> tuple[list[Range], list[dict[str, np.ndarray]]]:
    """Run in float32 and look at all that a cast would make half; also gives the outputs."""
    nodes = {node.name: node for node in proto.graph.node}
    of: dict[str, tuple[str, str, int]] = {}
    for depth, (name, path) in enumerate(halves.nodes.items()):
        for index in halves.outputs[name]:
            of[nodes[name].output[index]] = (path, halves.ops[name], depth)
    found: dict[str, Range] = {}
    outputs: list[dict[str, np.ndarray]] = [{} for _ in feeds]
    stepper = Stepper(proto, folder, of, nodes=PIECE_NODES)
    for number, name, array in stepper.run(feeds):
        if name in stepper.outputs:
            outputs[number][name] = array
        if name in of and array.size:
            one = _range(name, of[name], number, array, limits)
            found[name] = _joined(found[name], one) if name in found else one
    return sorted(found.values(), key=lambda one: one.depth), outputs


def _range(
    name: str, about: tuple[str, str, int], sample: int, array: np.ndarray, limits: Limits
) -> Range:
    # What a mask excludes is the lowest number, which a cast makes the lowest one of half.
    size = np.abs(array[~(array <= _LOWEST)])
    if not size.size:
        size = np.zeros(1, array.dtype)
    path, op, depth = about
    return Range(
        value=name,
        path=path,
        op=op,
        depth=depth,
        largest=float(size.max()),
        sample=sample,
        beyond=int((~(size <= limits.largest)).sum()),
        subnormal=float(((size < limits.normal) & (size > 0)).mean()),
        lost=float(((size < limits.smallest / 2) & (size > 0)).mean()),
    )


def _joined(a: Range, b: Range) -> Range:
    """Of two samples of one value the larger one, with what is worst of both."""
    more = b if not b.largest <= a.largest else a
    changes = {
        "beyond": a.beyond + b.beyond,
        "subnormal": max(a.subnormal, b.subnormal),
        "lost": max(a.lost, b.lost),
    }
    return Range(**{**vars(more), **changes})


def by_module(ranges: Sequence[Range]) -> Mapping[str, Range]:
    """Of each module the node whose values are largest."""
    found: dict[str, Range] = {}
    for one in ranges:
        if one.path not in found or not one.largest <= found[one.path].largest:
            found[one.path] = one
    return found
