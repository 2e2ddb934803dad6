"""The operands of a written-out attention as ``[B, heads, S, D]``, and its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import ONE, Dims
from sdopt.passes._raise_shapes import Shapes


class NotRaisedError(Exception):
    """Something written out that cannot be one node; the text says why."""


@dataclass
class Operands:
    """What an Attention node reads, and the values that it replaces."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    outs: Sequence[ir.Value]
    single: bool = False
    """Whether they were 3-D, and have an axis of one head now."""
    measured: Sequence[ir.Value] = ()
    """Shapes that were taken of the 3-D result."""
    heads: int = 1


def check_operands(q: ir.Value, kt: ir.Value, v: ir.Value | None, shapes: Shapes) -> None:
    """Refuse operands of another rank than 3 or 4, and those that MatMul broadcasts.

    Raises:
        NotRaisedError: saying which.
    """
    if v is None or _rank((q, kt, v), shapes) not in (3, 4):
        raise NotRaisedError("its operands are not known to be 3-D or 4-D")
    _same_batch((q, kt, v), shapes)


def _rank(values: Sequence[ir.Value], shapes: Shapes) -> int | None:
    ranks = {len(dims) for value in values if (dims := shapes.dims(value)) is not None}
    ranks |= {len(perm) for value in values if (perm := _perm(value))}
    return ranks.pop() if len(ranks) == 1 else None


def operands(
    q: ir.Value, kt: ir.Value, product: ir.Node, shapes: Shapes, emit: graph.Emitter, whole: bool
) -> Operands:
    """The checked operands in 4-D; ``whole`` says that a mask keeps 3-D ones from being split."""
    v, out = product.inputs[1], product.outputs[0]
    assert v is not None
    if _rank((q, kt, v), shapes) == 4:
        return Operands(q, _swapped(kt, 4, emit), v, [out])
    joined = None if whole else _joined_heads(out, shapes)
    if joined is not None:
        found = _split_heads(q, kt, v, shapes, emit, joined[0])
        if found is not None:
            measured = [u.outputs[0] for u in out.consumers() if u.op_type == "Shape"]
            return Operands(*found, joined[1], measured=measured, heads=joined[0])
    q, k, v = (emit("Unsqueeze", one, emit.const([1])) for one in (q, _swapped(kt, 3, emit), v))
    return Operands(q, k, v, [out], single=True)


def _same_batch(values: Sequence[ir.Value], shapes: Shapes) -> None:
    """A MatMul broadcasts its batches, and the axes of heads; Attention does not."""
    found = [shapes.dims(value) for value in values]
    known = [dims[:-2] for dims in found if dims is not None]
    for axis in range(min(map(len, known), default=0)):
        numbers = {dims[axis].known for dims in known} - {None}
        if len(numbers) > 1 or (numbers == {1} and len({dims[axis] for dims in known}) > 1):
            raise NotRaisedError("its operands have different batches or numbers of heads")


def _perm(value: ir.Value | None) -> list[int]:
    node = graph.producer(value, "Transpose")
    return list(graph.attribute(node, "perm", [])) if node is not None else []


def _swapped(kt: ir.Value, rank: int, emit: graph.Emitter) -> ir.Value:
    """``kt`` with its last two axes swapped, without a second Transpose where it has one."""
    perm, source = _perm(kt), kt
    if perm and (node := kt.producer()) is not None and node.inputs[0] is not None:
        source = node.inputs[0]
    else:
        perm = list(range(rank))
    perm[-2], perm[-1] = perm[-1], perm[-2]
    return source if perm == sorted(perm) else emit("Transpose", source, perm=perm)


def _joined_heads(out: ir.Value, shapes: Shapes) -> tuple[int, list[ir.Value]] | None:
    """The number of heads that every reader of ``[B * heads, S, D]`` splits again, and where."""
    dims, heads, found = shapes.dims(out), set(), []
    if dims is None or out.is_graph_output():
        return None
    for user in out.consumers():
        if user.op_type == "Shape" and not user.attributes:
            continue  # what computes the sizes of that very Reshape
        to = shapes.dims(user.outputs[0]) if user.op_type == "Reshape" else None
        if to is None or len(to) != 4 or list(to[2:]) != list(dims[1:]) or to[1].known is None:
            return None
        heads.add(to[1].known)
        found.append(user.outputs[0])
    return (heads.pop(), found) if len(heads) == 1 else None


def _split_heads(
    q: ir.Value, kt: ir.Value, v: ir.Value, shapes: Shapes, emit: graph.Emitter, heads: int
) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """The ``[B, heads, S, D]`` values that the 3-D operands are reshaped from, if all are."""
    transposed, whole_k = graph.producer(kt, "Transpose"), None
    whole_q, whole_v = _unmerged(q, shapes, heads), _unmerged(v, shapes, heads)
    if transposed is None:
        whole_k = _unmerged(kt, shapes, heads)
    elif _perm(kt) == [0, 2, 1]:
        whole_k = _unmerged(transposed.inputs[0], shapes, heads)
    if whole_q is None or whole_k is None or whole_v is None:
        return None
    return whole_q, _swapped(whole_k, 4, emit) if transposed is None else whole_k, whole_v


def _unmerged(value: ir.Value | None, shapes: Shapes, heads: int) -> ir.Value | None:
    reshape = graph.producer(value, "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    before, after = shapes.dims(source), shapes.dims(value)
    if before is None or after is None or len(before) != 4 or len(after) != 3:
        return None
    same = list(before[2:]) == list(after[1:]) and before[1].known == heads
    return source if same else None


def merged_shape(whole: ir.Value, heads: int, emit: graph.Emitter) -> ir.Value:
    """``[B * heads, S, D]`` of a value that is ``[B, heads, S, D]``."""
    batch = emit("Mul", emit("Shape", whole, start=0, end=1), emit.const([heads]))
    return emit("Concat", batch, emit("Shape", whole, start=2, end=4), axis=0)


def check_mask(mask: ir.Value, scores: Dims | None, shapes: Shapes) -> None:
    """Refuse an additive mask that is not known to cover every query and key.

    Raises:
        NotRaisedError: saying what about it.
    """
    dims = shapes.dims(mask)
    if dims is None or scores is None or not 2 <= len(dims) <= len(scores):
        raise NotRaisedError("the shape of its mask is not known")
    if list(dims[-2:]) != list(scores[-2:]):
        raise NotRaisedError("its mask is not known to hold a number for every query and key")
    lead = zip(dims[-3::-1], scores[-3::-1], strict=False)
    if len(dims) > 2 and any(a not in (ONE, b) for a, b in lead):
        raise NotRaisedError("its mask has another batch or number of heads")


def broad_mask(mask: ir.Value, shapes: Shapes, emit: graph.Emitter, single: bool) -> ir.Value:
    """The checked mask, with axes that let it broadcast to ``[B, heads, Sq, Sk]``."""
    if len(shapes.dims(mask) or ()) == 3:
        return emit("Unsqueeze", mask, emit.const([1 if single else 0]))
    return mask
