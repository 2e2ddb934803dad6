"""``cast_fp32``: a half-precision graph in float32, for what computes in nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._precision import HALVES, values
from sdopt.passes.base import Intent, Interface, Numerics, Pass, PassContext

_FLOAT = ir.DataType.FLOAT
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


@dataclass(frozen=True)
class CastFp32(Pass):
    """Compute in float32; half weights are widened while they are written, never held.

    Before / After:
        fp16 or bf16 weight, half arithmetic   ->  fp32 weight, fp32 arithmetic
        Cast(x, to=half)                       ->  Cast(x, to=float32), a no-op to ``clean``
        half inputs and outputs                ->  fp32

    Applies when: anything is in float16 or bfloat16. Every float16 and bfloat16 number is one of
    float32, so weights keep their values; what was rounded between operators no longer is. It is
    for compilers that take float32 only, from a checkpoint in half precision.

    Numerics: lossy against the half graph, by what that graph itself loses; it is nearer to the
    model than what it is compared with.

    Options: none.

    Counts: ``value``, those that became float32.

    Example:
        sdopt optimize BUNDLE --passes @fast,cast_fp32,lower_opset=17 --stage portable
    """

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    intent: ClassVar[Intent] = Intent.CAST
    interface: ClassVar[Interface] = Interface.CHANGES
    after: ClassVar[tuple[str, ...]] = ("lora", "clean", "raise_ops", "fuse_qkv", "pad_align")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Retype values, attributes and weights of every graph, bodies included."""
        if model.functions:
            ctx.skip("local functions carry types of their own: raise_ops inlines them", "model")
            return
        for value in values(model):
            tensor = value.const_value
            if tensor is not None and tensor.dtype in HALVES:
                value.const_value = weights.cast(tensor, _FLOAT)
                value.type, value.shape = ir.TensorType(_FLOAT), ir.Shape(tensor.shape.numpy())
                ctx.count("weight widened")
            elif value.dtype in HALVES:
                value.dtype = _FLOAT
                ctx.count("value")
        for node in list(graph.nodes(model)):
            _retype(node)


def _retype(node: ir.Node) -> None:
    for name in _TYPE_ATTRIBUTES:
        if name in node.attributes and graph.attribute(node, name) in HALVES:
            node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in HALVES:
                wide = ir.tensor(weights.cast(tensor, _FLOAT).numpy(), _FLOAT)
                node.attributes[name] = ir.AttrTensor(name, wide)
