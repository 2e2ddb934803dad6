"""The masks of a written-out attention as the one mask of an Attention node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes import _raise_patterns
from sdopt.passes._raise_dims import ONE, Dim, Dims
from sdopt.passes._raise_operands import Operands
from sdopt.passes._raise_scale import NotRaisedError, scale
from sdopt.passes._raise_scores import Mask, Scores
from sdopt.passes._raise_shapes import Shapes

_LOW = -1e4
"""A number that no score of a working model comes near: half precision ends at -65504."""


@dataclass(frozen=True)
class Masks:
    """The checked masks; ``causal`` where they are one that lets a query see what precedes it."""

    found: tuple[Mask, ...]
    causal: bool = False


def check_masks(found: Scores, shapes: Shapes) -> Masks:
    """Forget the zeros, know a causal mask, refuse what may not fit.

    Raises:
        NotRaisedError: a mask that is not known to broadcast to the scores, or a fill that does
            not mask.
    """
    kept = []
    for mask in found.masks:
        _check_fits(mask, found, shapes)
        if mask.fill is None and _is_zero(mask.value):
            continue
        if mask.fill is not None and not mask.fill <= _LOW:
            raise NotRaisedError(f"scores are replaced by {mask.fill:g}, which masks nothing")
        if mask.fill is not None and _factor(mask, found, shapes) != 1:
            raise NotRaisedError("its scores are scaled after they were masked")
        kept.append(mask)
    causal = len(kept) == 1 and _is_causal(kept[0], shapes)
    return Masks(tuple(kept), causal)


def _factor(mask: Mask, found: Scores, shapes: Shapes) -> float:
    if not mask.factors:
        return 1.0
    at = found.axes["q"].index("d")
    dims = shapes.dims(found.q)
    width = dims[at] if dims is not None else None
    number = scale(mask.factors, width, shapes)
    if number is None:
        known = width.known if width is not None else None
        if known is None:
            raise NotRaisedError("its mask is scaled by an unknown head size")
        return float(known**-0.5)
    return number


def _is_causal(mask: Mask, shapes: Shapes) -> bool:
    dims = shapes.dims(mask.value)
    if dims is None or len(dims) < 2 or mask.scores is None:
        return False
    if mask.fill is not None:
        band = _raise_patterns.Patterns(shapes).of(mask.value)
        edges = (float(mask.filled), float(not mask.filled))
        causal = isinstance(band, _raise_patterns.Band) and (
            (band.ahead, band.outside, band.inside) == (0, *edges)
        )
    else:
        causal = _raise_patterns.is_causal(mask.value, _LOW, shapes)
    return causal and list(dims[-2:]) == list(mask.scores[-2:]) and mask.axes[-2:] == "ij"


def _check_fits(mask: Mask, found: Scores, shapes: Shapes) -> None:
    """Refuse a mask that could make the scores it is added to larger."""
    dims, scores = shapes.dims(mask.value), mask.scores
    if dims is None or scores is None or len(dims) > len(scores):
        raise NotRaisedError("the shape of its mask is not known")
    for at in range(-1, -1 - len(dims), -1):
        if dims[at] not in _sizes(mask, at, found, shapes) and scores[at].number < 2:
            raise NotRaisedError("its mask is not known to have the sizes of its scores or 1")
    lead = mask.axes[0] == "N" and len(dims) == 3
    if lead and dims[0] not in _sizes(mask, -3, found, shapes):
        raise NotRaisedError("its mask is not known to have the batch of its scores, or 1")


def _sizes(mask: Mask, at: int, found: Scores, shapes: Shapes) -> list[Dim]:
    """What is known to fit axis ``at`` of the scores: 1, and their size, which q and k have."""
    sizes = [ONE] if mask.scores is None else [ONE, mask.scores[at]]
    for value, axes in ((found.q, found.axes["q"]), (found.k, found.axes["k"])):
        dims = shapes.dims(value)
        if dims is not None and mask.axes[at] in axes:
            sizes.append(dims[axes.index(mask.axes[at])])
    return sizes


def _is_zero(value: ir.Value) -> bool:
    """Zeros, as ``baddbmm(empty, q, k, beta=0)`` leaves them behind."""
    node, tensor = value.producer(), value.const_value
    if node is not None and node.op_type == "Constant":
        tensor = graph.constant_tensor(node)
    if tensor is not None and not value.is_graph_input():
        # Static exports fold them to a constant as large as the scores.
        return tensor.dtype.is_floating_point() and weights.extremes(tensor) == (0, 0)
    if node is None:
        return False
    if node.op_type == "ConstantOfShape":
        fill = graph.attribute(node, "value")
        return fill is None or not fill.numpy().any()
    if node.op_type == "Mul":
        sides = [side for side in node.inputs if side is not None]
        zeros = [_is_zero(side) for side in sides]
        scalars = [graph.scalar(side) is not None for side in sides]
        return any(zeros) and all(a or b for a, b in zip(zeros, scalars, strict=True))
    return (
        node.op_type in ("Expand", "Cast")
        and node.inputs[0] is not None
        and _is_zero(node.inputs[0])
    )


class MaskWriter:
    """Writes the checked masks for operands of ``[B, heads, S, D]``."""

    def __init__(
        self, found: Scores, operands: Operands, shapes: Shapes, emit: graph.Emitter
    ) -> None:
        self.found, self.operands, self.shapes, self.emit = found, operands, shapes, emit
        self.dtype = operands.dtype

    def write(self, masks: Masks) -> ir.Value | None:
        """One value whose last axes are queries and keys; bool where it is one condition."""
        if not masks.found or masks.causal:
            return None
        if len(masks.found) == 1 and masks.found[0].fill == -np.inf:
            mask = masks.found[0]
            value = self.emit("Not", mask.value) if mask.filled else mask.value
            return self._whole(value, mask)
        values = [self._whole(self._added(mask), mask) for mask in masks.found]
        total = values[0]
        for value in values[1:]:
            total = self.emit("Add", total, value)
        return total

    def _added(self, mask: Mask) -> ir.Value:
        """What is added to the scores, in the type of q."""
        if mask.fill is not None:
            kind = self.dtype.numpy()
            with np.errstate(over="ignore"):
                zero, low = (self.emit.const(np.array(n, kind), kind) for n in (0.0, mask.fill))
            sides = (low, zero) if mask.filled else (zero, low)
            return self.emit("Where", mask.value, *sides)
        value = mask.value
        if self.shapes.dtype(value) != self.dtype:
            value = self.emit("Cast", value, to=int(self.dtype))
        factor = _factor(mask, self.found, self.shapes)
        if factor != 1:
            kind = self.dtype.numpy()
            value = self.emit("Mul", value, self.emit.const(np.array(factor, kind), kind))
        return value

    def _whole(self, value: ir.Value, mask: Mask) -> ir.Value:
        """``value``, shaped as the mask, with every query and key and a place for the heads."""
        dims: Dims = self.shapes.dims(mask.value) or ()
        if mask.axes[-2:] != "ij" and len(dims) > 1:
            order = list(range(len(dims)))
            order[-2:] = order[:-3:-1]
            value = self.emit("Transpose", value, perm=order)
            dims = [dims[axis] for axis in order]
        scores = list(mask.scores or ())[-2:]
        if mask.axes[-2:] != "ij":
            scores.reverse()
        if [ONE, ONE, *dims][-2:] != scores or len(dims) < 2:
            value = self.emit("Expand", value, self._sizes(scores))
        if mask.axes[0] == "N" and len(dims) == 3 and dims[0] != ONE:
            value = self.operands.split(value, self.emit)
        return value

    def _sizes(self, scores: Dims) -> ir.Value:
        known = [dim.known for dim in scores]
        if None not in known:
            return self.emit.const(known)
        sizes = [self.emit("Shape", one, start=2, end=3) for one in self.operands.inputs[:2]]
        return self.emit("Concat", *sizes, axis=0)
