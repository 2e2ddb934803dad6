"""Reading an Attention node: its operands, what is known of their sizes, and what it is asked."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._heads import Heads, Layout
from sdopt.passes._raise_dims import ONE, Dim, Dims
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_NOT_READ = ("softcap", "qk_matmul_output_mode", "left_window_size", "right_window_size")


@dataclass(frozen=True)
class Attention:
    """One Attention node (ONNX operator of opset 23) without cache and without softcap.

    Attributes:
        node: the node.
        q, k, v: the operands; those of ``k`` and ``v`` may have fewer heads.
        out: what it computes.
        mask: what is added to the scores, or says which count; broadcasts to
            ``[B, heads, Sq, Sk]``.
        mask_dims: the mask's dimensions.
        batch, queries, keys: B, Sq and Sk.
        dtype: the element type of the operands.
        scale: what the scores are multiplied with.
        causal: whether query i sees keys 0 to i only.
    """

    node: ir.Node
    q: Heads
    k: Heads
    v: Heads
    out: Heads
    mask: ir.Value | None
    mask_dims: Dims
    batch: Dim
    queries: Dim
    keys: Dim
    dtype: ir.DataType
    scale: float
    causal: bool

    @property
    def is_grouped(self) -> bool:
        """Whether several heads of q share one of k and v."""
        return self.q.count != self.k.count

    @property
    def softmax_type(self) -> ir.DataType:
        """The element type that the node asks the softmax to be computed in."""
        asked = graph.attribute(self.node, "softmax_precision", 0)
        return ir.DataType(asked) if asked else self.dtype


class Kernel(abc.ABC):
    """A fused attention of some machine: what it takes, and how a node becomes it."""

    domain: ClassVar[str] = ""
    """The domain of its operator, if that is not the standard one."""

    @abc.abstractmethod
    def refusal(self, call: Attention) -> str | None:
        """Why the kernel cannot take this attention, in words for a report."""

    @abc.abstractmethod
    def write(self, call: Attention, shapes: Shapes, ctx: PassContext) -> bool:
        """Give the node the kernel's form; False where it has it already."""

    def write_refused(  # noqa: B027  (to leave a node alone is the default, not a gap)
        self, call: Attention, shapes: Shapes, ctx: PassContext
    ) -> None:
        """What becomes of a node that the kernel cannot take: by default it stays."""


def attentions(model: ir.Model) -> Iterator[ir.Node]:
    """The Attention nodes of the main graph, while it may be changed around them."""
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            yield node


def read(node: ir.Node, shapes: Shapes) -> Attention | str:
    """What an Attention node computes, or why that is not known, in words for a report."""
    extra = [value for value in node.inputs[4:] if value is not None]
    used = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    if extra or used:
        return "it keeps a cache of keys and values, or hands out its scores"
    for name in _NOT_READ:
        if graph.attribute(node, name, 0) not in (0, -1):
            return f"it sets {name}"
    values = [value for value in node.inputs[:3] if value is not None]
    dims = [shapes.dims(value) for value in values]
    q, k, v = (*dims, None, None, None)[:3]
    if q is None or k is None or v is None or {len(q), len(k), len(v)} not in ({3}, {4}):
        return "its operands are not known to be [B, heads, S, D] or [B, S, heads * D]"
    heads = _heads(node, values, (q, k, v))
    if isinstance(heads, str):
        return heads
    dtype = shapes.dtype(node.inputs[0])
    if dtype is None:
        return "the element type of its operands is not known"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    mask_dims = shapes.dims(mask) if mask is not None else ()
    if mask_dims is None or (mask is not None and not 2 <= len(mask_dims) <= 4):
        return "the shape of its mask is not known"
    axis = 2 if len(q) == 4 else 1
    scale = graph.attribute(node, "scale", None)
    first, _, last = heads
    return Attention(
        node=node,
        q=heads[0],
        k=heads[1],
        v=heads[2],
        out=Heads(node.outputs[0], first.layout, first.count, last.size),
        mask=mask,
        mask_dims=mask_dims,
        batch=q[0],
        queries=q[axis],
        keys=k[axis],
        dtype=dtype,
        scale=first.size**-0.5 if scale is None else float(scale),
        causal=bool(graph.attribute(node, "is_causal", 0)),
    )


def _heads(
    node: ir.Node, values: list[ir.Value], dims: tuple[Dims, Dims, Dims]
) -> tuple[Heads, Heads, Heads] | str:
    counts: list[int | None]
    if len(dims[0]) == 4:
        layout = Layout.FIRST
        counts = [one[1].known for one in dims]
        sizes = [one[3].known for one in dims]
    else:
        layout = Layout.FLAT
        names = ("q_num_heads", "kv_num_heads", "kv_num_heads")
        counts = [graph.attribute(node, name, None) for name in names]
        widths = [one[2].known for one in dims]
        sizes = [w // c if w and c else None for w, c in zip(widths, counts, strict=True)]
    if None in counts or None in sizes:
        return "its heads or head sizes are not known"
    q, k, v = (
        Heads(value, layout, int(count or 0), int(size or 0))
        for value, count, size in zip(values, counts, sizes, strict=True)
    )
    return q, k, v


def broadcasts(mask: Dims, axis: int, to: Dim) -> bool:
    """Whether an axis of a mask, counted from the end, is not known to be as long as ``to``."""
    return len(mask) < -axis or mask[axis] == ONE or mask[axis] != to
