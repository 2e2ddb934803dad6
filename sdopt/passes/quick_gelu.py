"""``quick_gelu``: the GELU of erf as the cheaper sigmoid that approximates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import Numerics, Pass, PassContext

KERNEL = "SliceTransGeluMul"
FACTOR = 1.702
"""Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2."""
MULTIPLE = 16
"""Of the kernel's tokens and channels."""
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class QuickGelu(Pass):
    """Approximate ``Gelu(x)`` by ``x * Sigmoid(1.702 * x)``, which is up to 0.021 off.

    Before / After:
        Gelu(x)                                  ->  x * Sigmoid(x * 1.702)
        Split(x) -> a, b;  a * Gelu(b)           ->  with kernel=ascend,  SliceTransGeluMul(x)

    Applies when: the Gelu is that of erf (``approximate`` none). With kernel=ascend
    (``--faster_gelu`` of Ascend's modify_onnx.py) only GEGLU is rewritten, a projection whose
    second half gates its first: one kernel reads both. It takes ``[B, S, 2 * C]`` with S and C
    fixed multiples of 16 and computes in fp16, with casts around it in an fp32 graph. Run
    ``quick_gelu`` behind it for what it leaves.

    Numerics: lossy.

    Options:
        kernel: standard (operators of ONNX, the default) or ascend.

    Counts: ``gelu``, and with kernel=ascend ``geglu``; those of that form already are done.

    Example:
        sdopt optimize BUNDLE --passes clean,cast_fp16,quick_gelu=ascend
    """

    kernel: Literal["standard", "ascend"] = "standard"

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("clean", "raise_ops", "cast_fp16", "cast_bf16")
    vendor_ops: ClassVar[frozenset[str]] = frozenset({KERNEL})

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Rewrite every Gelu of the main graph that the chosen form can stand for."""
        shapes = Shapes(model.graph)
        for node in list(model.graph):
            if node.domain not in ("", "ai.onnx"):
                continue
            if self.kernel == "ascend":
                _to_kernel(node, shapes, ctx)
            else:
                _to_sigmoid(node, shapes, ctx)


def _to_sigmoid(node: ir.Node, shapes: Shapes, ctx: PassContext) -> None:
    if node.op_type == "Sigmoid" and _is_quick(node):
        ctx.already("gelu")
    if node.op_type != "Gelu":
        return
    x, kind = node.inputs[0], shapes.dtype(node.inputs[0])
    if graph.attribute(node, "approximate", "none") != "none":
        ctx.skip("it is the approximation with tanh", node, kind="gelu")
    elif x is None or kind is None:
        ctx.skip("its element type is not known", node, kind="gelu")
    else:
        emit = ctx.emitter(node, f"{graph.module_path(node)}/quick_gelu")
        gate = emit("Sigmoid", emit("Mul", x, emit.const(FACTOR, kind.numpy())))
        _replace(node, emit("Mul", x, gate), shapes)
        ctx.count("gelu")


def _is_quick(sigmoid: ir.Node) -> bool:
    """Whether the factor of a quick GELU is in front; SiLU has none."""
    scaled = graph.producer(sigmoid.inputs[0], "Mul")
    factors = [graph.scalar(value) for value in scaled.inputs] if scaled is not None else []
    return any(factor is not None and abs(factor - FACTOR) < 1e-3 for factor in factors)


def _to_kernel(node: ir.Node, shapes: Shapes, ctx: PassContext) -> None:
    if node.op_type == KERNEL:
        ctx.already("geglu")
    if node.op_type != "Gelu":
        return
    found = _geglu(node, shapes)
    if isinstance(found, str):
        ctx.skip(found, node, kind="geglu")
        return
    source, product = found
    kind = shapes.dtype(source)
    emit = ctx.emitter(product, f"{graph.module_path(node)}/quick_gelu")
    half = source if kind == ir.DataType.FLOAT16 else emit("Cast", source, to=ir.DataType.FLOAT16)
    half.type = ir.TensorType(ir.DataType.FLOAT16)
    result = emit(KERNEL, half)
    result.type, result.shape = half.type, product.outputs[0].shape
    if kind is not None and kind != ir.DataType.FLOAT16:
        result = emit("Cast", result, to=kind)
        result.type = ir.TensorType(kind)
    _replace(product, result, shapes)
    ctx.count("geglu")


def _geglu(gelu: ir.Node, shapes: Shapes) -> tuple[ir.Value, ir.Node] | str:
    """The ``[B, S, 2 * C]`` value and the Mul of a GEGLU that the kernel takes, or why not."""
    gated = gelu.outputs[0]
    split, product = graph.producer(gelu.inputs[0], "Split"), graph.single_consumer(gated)
    if split is None or product is None or product.op_type != "Mul" or product.domain:
        return "it gates no half of a projection: quick_gelu without kernel takes it"
    value = next((v for v in product.inputs if v is not gated), None)
    dims = shapes.dims(split.inputs[0])
    if split.inputs[0] is None or dims is None or len(dims) != 3 or len(split.outputs) != 2:
        return f"its projection is not known to be [B, S, 2 * C], as {KERNEL} takes it"
    halves = [shapes.dims(half) for half in split.outputs]
    length, width = dims[1].known, dims[2].known
    # Without sizes a Split into two halves any width; the kernel's multiples see to odd ones.
    sized = len(split.inputs) > 1 and split.inputs[1] is not None
    half = (width or 0) // 2
    is_even = not sized or all(one is not None and one[2].known == half for one in halves)
    if graph.attribute(split, "axis", 0) not in (-1, 2) or not is_even:
        return "it gates no half of the last axis"
    if value is not split.outputs[0] or gelu.inputs[0] is not split.outputs[1]:
        return f"{KERNEL} takes the second half as the gate of the first"
    if graph.attribute(gelu, "approximate", "none") != "none":
        return "it is the approximation with tanh"
    if shapes.dtype(split.inputs[0]) not in _TYPES:
        return f"{KERNEL} computes in float16, and its type is another or not known"
    if length is None or width is None:
        return f"its number of tokens is not fixed, and {KERNEL} takes multiples of {MULTIPLE}"
    if length % MULTIPLE or width % (2 * MULTIPLE):
        return (
            f"{KERNEL} takes multiples of {MULTIPLE}, and it has {length} tokens of {width // 2}"
        )
    return split.inputs[0], product


def _replace(node: ir.Node, new: ir.Value, shapes: Shapes) -> None:
    shapes.stands_for(new, node.outputs[0])
    graph.replace_uses(node.outputs[0], new)
    graph.remove_dead([node])
