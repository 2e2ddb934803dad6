"""Finding a UNet's upsamplers: a doubling whose result meets a skip connection in a Concat."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _sizes

_UNARY = frozenset(("Identity", "Cast", "Dropout", "Sigmoid", "Relu", "LeakyRelu", "Clip"))
_BINARY = frozenset(("Add", "Sub", "Mul", "Div"))

_DOUBLINGS = frozenset(
    (
        ("asymmetric", "floor"),
        ("asymmetric", "round_prefer_floor"),
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
        ("pytorch_half_pixel", "round_prefer_floor"),
        ("pytorch_half_pixel", "round_prefer_ceil"),
    )
)
"""Coordinate and rounding modes under which nearest by 2 repeats each pixel once."""


@dataclass(frozen=True)
class Upsampler:
    """A Resize node and the skip tensor that its result is concatenated with."""

    node: ir.Node
    skip: ir.Value


def find(model: ir.Model) -> list[Upsampler]:
    """The upsamplers whose result meets a skip that is computed before them, in graph order."""
    found = []
    seen: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in ("Resize", "Upsample") and not node.domain:
            for skip in _skips(node.outputs[0]):
                if skip.producer() in seen or skip.is_graph_input():
                    found.append(Upsampler(node, skip))
                    break
        seen.add(node)
    return found


def fault(upsampler: Upsampler, sizes: _sizes.Sizes, model: ir.Model) -> bool | str:
    """Whether an upsampler's size holds only where nothing was rounded, or why it is unclear.

    False where its size already follows the skip or is exact arithmetic on the graph's inputs.
    """
    node = upsampler.node
    if node.op_type == "Upsample":
        return "Upsample takes no computed size: convert the graph to opset 11 or newer"
    if (mode := graph.attribute(node, "mode", "nearest")) != "nearest":
        return f"{mode} upsampling: only nearest by 2 can take the skip's size exactly"
    target = node.inputs[3] if len(node.inputs) > 3 else None
    if target is None:
        return _doubles(node, sizes[node.inputs[2 if len(node.inputs) > 2 else 1]])
    images = _sizes.latents(model)
    for axis, entry in zip((2, 3), _sizes.sides(sizes[target]), strict=True):
        free = any(not isinstance(v.shape[axis], int) for v in images if v.shape is not None)
        fixed = entry is not None and not any(_sizes.depends(entry))
        if _sizes.is_baked(entry) or (fixed and free):
            return True
    return _twice_its_input(node, target, model)


def _doubles(node: ir.Node, scales: _sizes.Vector | None) -> bool | str:
    if scales is None or any(entry is None for entry in scales):
        return "its scales are computed when the graph runs"
    numbers = [float(entry[0]) for entry in scales if entry is not None]
    axes = [axis % 4 for axis in graph.attribute(node, "axes", range(4))]
    factors = dict(zip(axes, numbers, strict=False))
    if [factors.get(axis, 1.0) for axis in range(4)] != [1, 1, 2, 2]:
        return f"it scales by {numbers}, not by 2 in height and width"
    default = "half_pixel" if len(node.inputs) > 2 else "asymmetric"
    rounding = "round_prefer_floor" if len(node.inputs) > 2 else "floor"
    coordinates = graph.attribute(node, "coordinate_transformation_mode", default)
    rounding = graph.attribute(node, "nearest_mode", rounding)
    if (coordinates, rounding) not in _DOUBLINGS:
        return f"nearest with {coordinates} and {rounding} does not simply repeat pixels"
    return True


def _twice_its_input(node: ir.Node, target: ir.Value, model: ir.Model) -> bool:
    """Whether the sizes of a Resize are two times the height and width of what it reads."""
    if (source := node.inputs[0]) is None:
        return False
    known = {source: [None, None, _sizes.HEIGHT, _sizes.WIDTH]}
    wanted = _sizes.sides(_sizes.Sizes(model, known)[target])
    twice = (2 * _sizes.HEIGHT, 2 * _sizes.WIDTH)
    return all(
        entry is not None and np.array_equal(entry, side)
        for entry, side in zip(wanted, twice, strict=True)
    )


def _skips(value: ir.Value) -> Iterator[ir.Value]:
    """What ``value`` is concatenated with along channels, after nodes that keep its size."""
    queue, seen = deque([value]), {value}
    while queue:
        current = queue.popleft()
        for user in current.consumers():
            if user.op_type == "Concat" and graph.attribute(user, "axis") in (1, -3):
                yield from (v for v in user.inputs if v is not None and v is not current)
            elif _keeps_size(user, current) and user.outputs[0] not in seen:
                seen.add(user.outputs[0])
                queue.append(user.outputs[0])


def _keeps_size(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node's output has the height and width of ``value``, whatever those are."""
    if node.op_type in _BINARY:
        others = [v for v in node.inputs if v is not value]
        return all(v is not None and (v.is_initializer() or _sizes.is_number(v)) for v in others)
    if node.op_type != "Conv":
        return node.op_type in _UNARY
    weight = node.inputs[1]
    kernel = graph.attribute(node, "kernel_shape")
    if kernel is None and weight is not None:
        known = weight.shape if weight.const_value is None else weight.const_value.shape
        kernel = [*known][2:] if known is not None else None
    if kernel is None or not all(isinstance(side, int) for side in kernel):
        return False
    if any(s != 1 for s in graph.attribute(node, "strides", (1, 1))):
        return False
    if str(graph.attribute(node, "auto_pad", "NOTSET")).startswith("SAME"):
        return True
    rank = len(kernel)
    pads = graph.attribute(node, "pads", (0,) * 2 * rank)
    dilations = graph.attribute(node, "dilations", (1,) * rank)
    return all(pads[i] + pads[i + rank] == dilations[i] * (kernel[i] - 1) for i in range(rank))
