"""Reshapes between images and tokens whose sizes were frozen when the graph was traced."""

from __future__ import annotations

from collections import deque

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _sizes
from sdopt.passes.base import PassContext

Source = tuple[ir.Value, int]
"""A live tensor and the axis whose size is meant."""

Plan = dict[int, Source | None]
"""Entry of a shape vector to its source, None for the one that Reshape itself computes (-1)."""

_KEEPS_TOKENS = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Identity", "Cast", "Dropout", "MatMul", "Transpose"),
        *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
        "SkipLayerNormalization",
    )
)


def restore(model: ir.Model, sizes: _sizes.Sizes, ctx: PassContext) -> list[ir.Value]:
    """Take the sizes of each Reshape from live tensors; returns the outputs of those rewritten.

    Every decision is made on the graph as it came, then the shape vectors are replaced.
    """
    plans: list[tuple[ir.Node, Plan]] = []
    for node in model.graph:
        baked = _baked(node, sizes)
        if node.op_type != "Reshape" or node.domain:
            if baked:
                reason = f"{node.op_type} with a size that holds only where it was traced"
                ctx.skip(reason, node, "baked_size")
        elif baked:
            plan = _plan(node, baked, sizes)
            if plan is None:
                reason = "Reshape with a frozen size, and no live tensor to take it from"
                ctx.skip(reason, node, "baked_size")
            else:
                plans.append((node, plan))
    written: dict[tuple[object, ...], ir.Value] = {}
    for node, plan in plans:
        old = node.inputs[1]
        if old is None:
            continue
        key = (old, *plan.items())
        if key not in written:
            written[key] = _write(node, plan, sizes, ctx)
        node.replace_input_with(1, written[key])
        graph.remove_dead([maker for maker in [old.producer()] if maker is not None])
        ctx.count("baked_size")
    return [node.outputs[0] for node, _ in plans]


def _baked(node: ir.Node, sizes: _sizes.Sizes) -> list[int]:
    """Positions of frozen sizes in what a node reads, unless the node itself is arithmetic."""
    if node.outputs and sizes[node.outputs[0]] is not None:
        return []
    for value in node.inputs:
        if found := [i for i, entry in enumerate(sizes[value] or ()) if _sizes.is_baked(entry)]:
            return found
    return []


def _plan(node: ir.Node, baked: list[int], sizes: _sizes.Sizes) -> Plan | None:
    """Where each frozen entry of a Reshape comes from: the one free entry, or a live tensor."""
    vector = sizes[node.inputs[1]] or []
    if len(baked) == 1 and not any(_is_free(entry) for entry in vector):
        return {baked[0]: None}
    height = baked[0]
    if baked != [height, height + 1]:
        return None
    roles = [_sizes.depends(vector[at]) for at in baked]
    flattened = _flattened(node.inputs[0], sizes)
    if roles != [(True, False), (False, True)] or flattened is None:
        return None
    image, axis = flattened
    return {height: (image, axis), height + 1: (image, axis + 1)}


def _is_free(entry: _sizes.Entry) -> bool:
    return entry is not None and bool((entry == -1).all())


def _flattened(tokens: ir.Value | None, sizes: _sizes.Sizes) -> Source | None:
    """The image that tokens were flattened from, back along what keeps their number.

    In a transformer block that is the residual path; the heads of an attention are split and
    merged by Reshapes too, which end a path without being the flattening.
    """
    queue, seen = deque([tokens]), {tokens}
    while queue:
        value = queue.popleft()
        node = value.producer() if value is not None else None
        if node is None:
            continue
        if node.op_type == "Reshape":
            if (axis := _merged_axis(node, sizes)) is not None and node.inputs[0] is not None:
                return node.inputs[0], axis
        elif node.op_type in _KEEPS_TOKENS:
            fresh = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return None


def _merged_axis(node: ir.Node, sizes: _sizes.Sizes) -> int | None:
    """The axis of height in what a Reshape flattens, ``[.., H, W, ..]`` to ``[.., H*W, ..]``."""
    source, vector = node.inputs[0], sizes[node.inputs[1]]
    rank, dims = _rank(source), sizes.dims(source)
    if vector is None or rank != len(vector) + 1:
        return None
    spatial = [i for i, entry in enumerate(vector) if any(_sizes.depends(entry))]
    if len(spatial) == 1 and all(_sizes.depends(vector[spatial[0]])):
        return spatial[0]
    free = [i for i, entry in enumerate(vector) if _is_free(entry)]
    if spatial or len(free) != 1 or dims is None:
        return None
    # [B, -1, C]: heads that are merged have fixed sizes, an image's height and width have not.
    (axis,) = free
    return axis if dims[axis] is None and dims[axis + 1] is None else None


def _rank(value: ir.Value | None) -> int | None:
    if value is None or value.shape is not None:
        return None if value is None or value.shape is None else len(value.shape)
    transpose = graph.producer(value, "Transpose")
    perm = graph.attribute(transpose, "perm") if transpose is not None else None
    return len(perm) if perm is not None else None


def _write(node: ir.Node, plan: Plan, sizes: _sizes.Sizes, ctx: PassContext) -> ir.Value:
    """The shape vector with its frozen entries replaced, in front of ``node``."""
    emit, old = ctx.emitter(node, "pad_align"), node.inputs[1]
    maker = graph.producer(old, "Concat")
    parts = list(maker.inputs) if maker is not None else []
    whole = [len(sizes[part] or ()) == 1 for part in parts]
    entries: list[ir.Value | None] = []
    for at in range(len(sizes[old] or ())):
        if at not in plan:
            one = parts[at] if all(whole) and parts else _sizes.part(emit, old, at, at + 1)
        elif (source := plan[at]) is None:
            one = emit.const([-1])
        else:
            image, axis = source
            one = _sizes.part(emit, emit("Shape", image), axis, axis + 1)
        entries.append(one)
    return emit("Concat", *entries, axis=0)
