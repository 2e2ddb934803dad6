"""``flash_attention``: Attention as the fused kernel of the machine that will run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from sdopt.passes._attention import Kernel, attentions, read
from sdopt.passes._attention_ascend import FlashAttentionTik, UnpadFlashAttentionMix
from sdopt.passes._attention_ort import MultiHeadAttention, Packing
from sdopt.passes._attention_trt import Form, TensorRt
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class FlashAttention(Pass):
    """Write each Attention as the fused attention of one kind of machine.

    Before / After:
        ort   Attention(T(Reshape(q)), T(Reshape(k)), T(Reshape(v))) -> T -> Reshape
                  ->  com.microsoft::MultiHeadAttention(q, k, v)
        trt   Attention(q, k, v)  ->  the same, within what TensorRT's kernels take; or, with
              form=decomposed,  MatMul(Softmax(MatMul(q * scale, k^T)), v)
        duo   Attention(q, k, v)  ->  FlashAttentionTik(q * scale, k, v), [B, heads, S, D]
        a2    Attention(q, k, v)  ->  UnpadFlashAttentionMix(q, k, v), [B, S, heads, D]

    Applies when: the heads and head sizes are known, there is no cache and no softcap, and the
    kernel has the sizes. What it cannot take stays an Attention, with the reason;
    ``lower_attention`` writes that out.

    - ort: fp32 and fp16; a mask becomes the operator's attention_bias; causal where there are as
      many keys as queries.
    - trt: fp16 and bf16 with heads of up to 256. The native form needs TensorRT 10.14 or
      TensorRT-RTX 1.7; for older parsers, form=decomposed, with the scale on q in front of the
      first MatMul, where TensorRT looks for it. An attention beyond that is written out in either
      form, and reported, because it would fail the build as one node.
    - duo (Atlas 300I Duo and Pro, Ascend310P; ``--FA_soc Duo`` of Ascend's modify_onnx.py): no
      mask; fixed sizes, batch up to 64, heads up to 4096, up to 131072 tokens, heads of 40, 48,
      64, 72, 80, 128, 160 or 512.
    - a2 (Atlas 800I A2, Ascend910B; ``--FA_soc A2``): self-attention without mask; fixed sizes,
      batch up to 2, 5 to 10 heads of 40 or 64, 1024 to 4096 tokens. The kernel scales by
      ``D ** -0.5``; what another scale differs by is multiplied into q.

    Both Ascend kernels compute in fp16: in an fp32 graph there are casts around each, so that it
    works with and without ``cast_fp16`` in front. They are operators of no domain, which only
    Ascend's compiler knows.

    Numerics: reassociated (a kernel sums softmax block by block); lossy for duo and a2, which
    compute in fp16 whatever the graph is in.

    Options:
        kernel: ort, trt, duo or a2.
        packed: ort only, for its CUDA kernels, which take it without a mask: kv packs keys and
            values into one operand ``[B, S, heads, 2, D]``, qkv a self-attention's all three into
            ``[B, S, heads, 3, D]``. One projection with interleaved weights makes them, so
            ``fuse_qkv`` must not have run. By default none: separate operands were as fast
            (7.78 against 7.81 ms a step of SD1.5 on an H200), and run on the CPU too.
        form: trt only, native (the default) or decomposed.
        pad: duo only: pad heads of other sizes with zeros to the kernel's next larger size, and
            cut them off again, which is exact (true by default).

    Why MultiHeadAttention on ONNX Runtime's CPU: the Attention kernel of onnxruntime 1.31 makes
    the whole ``[B, heads, S, S]`` matrix, this one goes over it in blocks that stay in the cache.
    Measured by ``benchmarks/lowering.py``, batch 2, CPU time over Attention's (lower is better):

        heads x D, Sq x Sk    ort     MatMul, Softmax, MatMul    Attention of 3-D operands
        8 x 8, 1024 x 1024    0.72    1.07                       0.98
        8 x 40, 1024 x 1024   0.81    1.04                       0.98
        8 x 40, 4096 x 4096   0.75    1.01                       0.96
        8 x 40, 4096 x 77     0.80    0.90                       0.83
        4 x 8, 256 x 256      0.97    0.95                       0.81
        1 x 512, 1024 x 1024  1.01    1.06                       0.90

    A whole step of examples/digits, both lowerings over the raw graph: 0.77 at a latent of 16x16
    in a batch of 2, 0.74 of 16, 0.82 at 32x32; with 3-D Attention 0.75, 0.86 and 0.88.

    Counts: ``attention``; with form=decomposed ``decomposed_attention``.

    Example:
        sdopt optimize BUNDLE --passes @fast,flash_attention=trt
    """

    kernel: Literal["ort", "trt", "duo", "a2"]
    packed: Packing = "none"
    form: Form = "native"
    pad: bool = True

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "fuse_qkv",
        "cast_fp16",
        "cast_bf16",
        "tome",
    )
    vendor_ops: ClassVar[frozenset[str]] = frozenset(
        {FlashAttentionTik.op, UnpadFlashAttentionMix.op}
    )

    def __post_init__(self) -> None:
        for option, default, kernel in (
            ("packed", "none", "ort"),
            ("form", "native", "trt"),
            ("pad", True, "duo"),
        ):
            if getattr(self, option) != default and self.kernel != kernel:
                raise ValueError(f"{option} is an option of {kernel}, not of {self.kernel}")

    def exactness(self) -> Numerics:
        """Lossy on Ascend, whose kernels compute in float16."""
        return Numerics.LOSSY if self.kernel in ("duo", "a2") else self.numerics

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Lower every Attention of the main graph that the kernel can take."""
        kernel = self._kernel()
        shapes = Shapes(model.graph)
        for node in attentions(model):
            call = read(node, shapes)
            reason = call if isinstance(call, str) else kernel.refusal(call)
            if reason is not None:
                ctx.skip(reason, node, kind="attention")
            if isinstance(call, str):
                continue
            if reason is not None:
                kernel.write_refused(call, shapes, ctx)
            elif kernel.write(call, shapes, ctx):
                ctx.count("attention")
                if kernel.domain:
                    model.opset_imports[kernel.domain] = 1
            else:
                ctx.already("attention")

    def _kernel(self) -> Kernel:
        if self.kernel == "ort":
            return MultiHeadAttention(self.packed)
        if self.kernel == "trt":
            return TensorRt(self.form)
        return FlashAttentionTik(self.pad) if self.kernel == "duo" else UnpadFlashAttentionMix()
