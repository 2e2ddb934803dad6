"""``flash_attention=duo`` and ``a2``: the attention kernels of Ascend's MindIE-SD and MindIE-RT.

Sources: the operator prototypes and ONNX plug-ins of Ascend/MindIE-SD (``csrc/ops``) and
``modify_onnx.py`` of Ascend/ModelZoo-PyTorch's stable_diffusion. The operators live in the
standard domain, have no attributes, and compute in float16.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes import _linear
from sdopt.passes._attention import Attention, Kernel
from sdopt.passes._attention_decomposed import finish, scaled
from sdopt.passes._heads import Layout
from sdopt.passes._raise_dims import Dim
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

HALF = ir.DataType.FLOAT16
_TYPES = (ir.DataType.FLOAT, HALF)


class Ascend(Kernel):
    """What both kernels share: their types, their fixed sizes, and a scale of their own."""

    op: ClassVar[str]
    layout: ClassVar[Layout]
    limits: ClassVar[Mapping[str, tuple[int, int]]]
    """Least and greatest, in the order batch, heads, queries, keys."""

    def refusal(self, call: Attention) -> str | None:
        """Why the kernel cannot take this attention."""
        if call.mask is not None or call.causal:
            return f"it has a mask, which {self.op} does not take"
        if call.is_grouped:
            return "heads share keys and values (grouped query attention)"
        if call.dtype not in _TYPES:
            return f"{self.op} computes in float16, and this is {call.dtype.name.lower()}"
        if call.q.size != call.v.size:
            return "its values have another head size than its queries and keys"
        heads = Dim(call.q.count)
        sizes = (call.batch, heads, call.queries, call.keys)
        for dim, (name, (low, high)) in zip(sizes, self.limits.items(), strict=True):
            if dim.known is None:
                return (
                    f"its {name} is not fixed, and {self.op} takes {low} to {high}: "
                    "give the graph's inputs fixed sizes"
                )
            if not low <= dim.known <= high:
                return f"its {name} is {dim.known}, and {self.op} takes {low} to {high}"
        return self.refused_size(call)

    @abc.abstractmethod
    def refused_size(self, call: Attention) -> str | None:
        """Why the head size, or where its keys come from, is not for this kernel."""

    def write(self, call: Attention, shapes: Shapes, ctx: PassContext) -> bool:
        """Replace the node; in a float32 graph with casts around the kernel."""
        emit = ctx.emitter(call.node, f"{graph.module_path(call.node)}/flash_attention")
        operands = [part.to(self.layout, emit, shapes) for part in (call.q, call.k, call.v)]
        operands[0] = scaled(operands[0], self.factor(call), call.dtype, emit)
        ready = {
            value: self.padded(cast(value, HALF, call.dtype, emit), call, length, emit)
            for value, length in zip(operands, (call.queries, call.keys, call.keys), strict=True)
        }
        result = emit(self.op, *(ready[value] for value in operands))
        result.type = ir.TensorType(HALF)
        result.shape = ir.Shape(self.dims(call))
        result = cast(self.cropped(result, call, emit), call.dtype, HALF, emit)
        finish(call, result, self.layout, emit, shapes)
        return True

    @abc.abstractmethod
    def factor(self, call: Attention) -> float:
        """What q is multiplied with before the kernel."""

    @abc.abstractmethod
    def dims(self, call: Attention) -> tuple[int, ...]:
        """The shape of what the kernel makes."""

    def padded(
        self, value: ir.Value, call: Attention, length: Dim, emit: graph.Emitter
    ) -> ir.Value:
        """An operand at a head size that the kernel has."""
        return value

    def cropped(self, result: ir.Value, call: Attention, emit: graph.Emitter) -> ir.Value:
        """The result without what ``padded`` added."""
        return result


class FlashAttentionTik(Ascend):
    """Atlas 300I Duo and Pro (Ascend310P): ``[B, heads, S, D]``, unscaled, self and cross."""

    op: ClassVar[str] = "FlashAttentionTik"
    layout: ClassVar[Layout] = Layout.FIRST
    limits: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch size": (1, 64),
        "number of heads": (1, 4096),
        "number of queries": (1, 131072),
        "number of keys": (1, 131072),
    }
    sizes: ClassVar[tuple[int, ...]] = (40, 48, 64, 72, 80, 128, 160, 512)

    def __init__(self, pad: bool) -> None:
        self._pad = pad
        self._zeros: dict[tuple[int, ...], ir.Value] = {}

    def refused_size(self, call: Attention) -> str | None:
        """Sizes between those of the kernel are padded, if that is allowed."""
        size, known = call.q.size, ", ".join(map(str, self.sizes))
        if size > self.sizes[-1] or (size not in self.sizes and not self._pad):
            return f"its head size is {size}, and {self.op} takes {known}"
        return None

    def factor(self, call: Attention) -> float:
        """The kernel does not scale."""
        return call.scale

    def dims(self, call: Attention) -> tuple[int, ...]:
        """``[B, heads, Sq, D]`` with the head size of the kernel."""
        return call.batch.number, call.q.count, call.queries.number, self._fitting(call)

    def padded(
        self, value: ir.Value, call: Attention, length: Dim, emit: graph.Emitter
    ) -> ir.Value:
        """Zeros at the end of each head add nothing to ``q . k``, and columns of zeros to v."""
        missing = self._fitting(call) - call.q.size
        if not missing:
            return value
        shape = (call.batch.number, call.q.count, length.number, missing)
        if shape not in self._zeros:
            self._zeros[shape] = emit.weight(weights.full(shape, 0.0, HALF), "zeros")
        return emit("Concat", value, self._zeros[shape], axis=3)

    def cropped(self, result: ir.Value, call: Attention, emit: graph.Emitter) -> ir.Value:
        """The first D of each head."""
        if self._fitting(call) == call.q.size:
            return result
        return emit("Slice", result, emit.const([0]), emit.const([call.q.size]), emit.const([3]))

    def _fitting(self, call: Attention) -> int:
        return next(size for size in self.sizes if size >= call.q.size)


class UnpadFlashAttentionMix(Ascend):
    """Atlas 800I A2 (Ascend910B): ``[B, S, heads, D]``, scaled by ``D ** -0.5``, self only."""

    op: ClassVar[str] = "UnpadFlashAttentionMix"
    layout: ClassVar[Layout] = Layout.LAST
    limits: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch size": (1, 2),
        "number of heads": (5, 10),
        "number of queries": (1024, 4096),
        "number of keys": (1024, 4096),
    }
    sizes: ClassVar[tuple[int, ...]] = (40, 64)

    def refused_size(self, call: Attention) -> str | None:
        """40 and 64, and only where q, k and v are projections of one input."""
        if call.q.size not in self.sizes:
            return f"its head size is {call.q.size}, and {self.op} takes 40 or 64"
        if len({_source(part.value) for part in (call.q, call.k, call.v)}) > 1:
            return f"its keys come from another input, and {self.op} is for self-attention"
        return None

    def dims(self, call: Attention) -> tuple[int, ...]:
        """``[B, S, heads, D]``."""
        return call.batch.number, call.queries.number, call.q.count, call.q.size

    def factor(self, call: Attention) -> float:
        """What is left of the scale beside the kernel's own."""
        rest = call.scale * math.sqrt(call.q.size)
        return 1.0 if math.isclose(rest, 1, rel_tol=1e-6) else rest


def cast(value: ir.Value, to: ir.DataType, given: ir.DataType, emit: graph.Emitter) -> ir.Value:
    """``value``, of the type ``given``, in another one."""
    if to == given:
        return value
    out = emit("Cast", value, to=int(to))
    out.type, out.shape = ir.TensorType(to), value.shape
    return out


def _source(value: ir.Value) -> ir.Value | None:
    """What the projection behind an operand reads."""
    found = _linear.behind(value)
    if isinstance(found, _linear.Linear):
        return found.x
    split = graph.producer(found, "Split")
    return _source(split.inputs[0]) if split is not None and split.inputs[0] else found
