"""How operators that move and cut data carry the batch, and where their shapes hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._batch_axes import Batch, Unproven, along, axis_of, spread


def transposes(node: ir.Node, batch: Batch) -> None:
    first, out = node.inputs[0], node.outputs[0]
    rank = len(batch.sizes(out, node))
    perm = list(graph.attribute(node, "perm", range(rank)[::-1]))
    if (axis := batch.axis(first)) is not None:
        batch.mark(out, perm.index(axis), node)
    if (axis := batch.axis(out)) is not None:
        batch.mark(first, perm[axis], node)


def regroups(node: ir.Node, batch: Batch) -> None:
    """Reshape and its kin: the half of a run of elements, told by what lies outside of it."""
    first, out = node.inputs[0], node.outputs[0]
    for known, other in ((first, out), (out, first)):
        axis = batch.axis(known)
        if known is None or other is None or axis is None:
            continue
        sizes, others = batch.sizes(known, node), batch.sizes(other, node)
        outside = _product(sizes[:axis])
        found = next(
            (i for i, n in enumerate(others) if n != 1 and _product(others[:i]) == outside), None
        )
        if outside is None or found is None:
            raise Unproven(f"{node.op_type} merges the batch into another axis", node)
        batch.mark(other, found, node)
    before, after = batch.axis(first), batch.axis(out)
    if node.op_type == "Reshape" and after is not None and before is not None:
        target = graph.constant(node.inputs[1])
        entry = None if target is None else int(target.reshape(-1)[after])
        copies = entry == 0 and not graph.attribute(node, "allowzero", 0)
        if copies and before != after:
            raise Unproven("Reshape copies a size for the batch from another axis", node)
        if entry is None or entry > 0:
            batch.halve_entry(node, 1, after, node)


def _product(sizes: Sequence[int | None]) -> int | None:
    numbers = [size for size in sizes if size is not None]
    return math.prod(numbers) if len(numbers) == len(sizes) else None


def expands(node: ir.Node, batch: Batch) -> None:
    spread(node, batch, node.inputs[:1], node.outputs[0])
    axis, out, target = batch.axis(node.outputs[0]), node.outputs[0], node.inputs[1]
    if axis is None or target is None:
        return
    (length,) = batch.sizes(target, node)
    entry = axis - (len(batch.sizes(out, node)) - (length or 0))
    vector = graph.constant(target)
    if length and entry >= 0 and (vector is None or vector[entry] > 1):
        batch.halve_entry(node, 1, entry, node)


def fills(node: ir.Node, batch: Batch) -> None:
    axis = batch.axis(node.outputs[0])
    if axis is not None:
        batch.halve_entry(node, 0, axis, node)


def joins(node: ir.Node, batch: Batch) -> None:
    """Concat and Split, along another axis than the batch."""
    across = axis_of(node, batch, 0)
    others = node.inputs[1:] if node.op_type == "Concat" else ()
    if along(node, batch, *others) == across:
        raise Unproven(f"{node.op_type} runs along the batch", node)


def cuts(node: ir.Node, batch: Batch) -> None:
    known = along(node, batch)
    if len(node.inputs) < 3:
        raise Unproven("Slice as opset 9 writes it", node)
    given = [graph.constant(value) if value is not None else None for value in node.inputs[1:4]]
    starts, axes = given[0], given[2] if len(given) > 2 else None
    if axes is None and (len(node.inputs) > 3 or starts is None):
        raise Unproven("the axes of Slice are computed", node)
    cut = range(len(starts)) if axes is None and starts is not None else axes
    rank = len(batch.sizes(node.outputs[0], node))
    if cut is None or known in [int(axis) % rank for axis in cut]:
        raise Unproven("Slice cuts the batch", node)


def gathers(node: ir.Node, batch: Batch) -> None:
    (data, indices), out = node.inputs, node.outputs[0]
    if data is None or indices is None:
        return
    at, width = axis_of(node, batch, 0), len(batch.sizes(indices, node))
    if (axis := batch.axis(data)) is not None:
        if axis == at:
            raise Unproven("Gather picks from the batch", node)
        batch.mark(out, axis if axis < at else axis + width - 1, node)
    if (axis := batch.axis(indices)) is not None:
        batch.mark(out, at + axis, node)
    if (axis := batch.axis(out)) is not None:
        if at <= axis < at + width:
            batch.mark(indices, axis - at, node)
        else:
            batch.mark(data, axis if axis < at else axis - width + 1, node)


def pads(node: ir.Node, batch: Batch) -> None:
    known = along(node, batch)
    widths = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if widths is None or known is None or len(node.inputs) > 3:
        raise Unproven("the widths or axes of Pad are computed", node)
    if widths[known] or widths[known + len(widths) // 2]:
        raise Unproven("Pad pads the batch", node)
