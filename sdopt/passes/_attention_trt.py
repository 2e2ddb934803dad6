"""``flash_attention=trt``: what TensorRT's fused attention kernels take."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._attention import HALVES, Attention, Kernel
from sdopt.passes._attention_decomposed import write_decomposed
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

MAX_HEAD_SIZE = 256
"""Of the fused kernels of TensorRT-RTX 1.7; a larger head is computed unfused."""

Form = Literal["native", "decomposed"]


class TensorRt(Kernel):
    """The Attention node itself, or MatMul, Softmax and MatMul for parsers that lack it."""

    def __init__(self, form: Form) -> None:
        self._form = form

    def refusal(self, call: Attention) -> str | None:
        """Why no fused kernel takes this attention."""
        if call.dtype not in HALVES:
            return (
                f"TensorRT fuses attention in fp16 and bf16, and this is "
                f"{call.dtype.name.lower()} (put cast_fp16 before): written as MatMul, Softmax, "
                "MatMul"
            )
        size = max(call.q.size, call.v.size)
        if size > MAX_HEAD_SIZE:
            return (
                f"its head size of {size} is above the {MAX_HEAD_SIZE} that TensorRT fuses: "
                "written as MatMul, Softmax, MatMul"
            )
        return None

    def write(self, call: Attention, shapes: Shapes, ctx: PassContext) -> bool:
        """Replace or tidy the node; False where it has the form already."""
        if self._form == "decomposed":
            write_decomposed(call, "flash_attention", shapes, ctx)
            return True
        # The parser refuses the attribute; the fused kernels compute the softmax in float32.
        changed = call.node.attributes.pop("softmax_precision", None) is not None
        kind = shapes.dtype(call.mask)
        if call.mask is not None and kind not in (ir.DataType.BOOL, call.dtype):
            # The parser takes a mask of another type, and the build fails (TensorRT-RTX 1.7).
            emit = ctx.emitter(call.node, f"{graph.module_path(call.node)}/flash_attention")
            call.node.replace_input_with(3, emit("Cast", call.mask, to=int(call.dtype)))
            changed = True
        return changed

    def write_refused(self, call: Attention, shapes: Shapes, ctx: PassContext) -> None:
        """Decompose: a native Attention that no fused kernel takes fails the whole build."""
        write_decomposed(call, "flash_attention", shapes, ctx)
        ctx.count("decomposed_attention")
