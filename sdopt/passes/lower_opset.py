"""``lower_opset``: the canonical graph as plain ONNX of the opset that a reader takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt.passes._lower_opset import NEWEST, OLDEST, write_in
from sdopt.passes.base import Numerics, Pass, PassContext


@dataclass(frozen=True)
class LowerOpset(Pass):
    """Write a graph in another opset, 11 to 25, with operators that it has.

    Before / After:
        Gelu, Swish, Mish           ->  Erf, Tanh, Sigmoid and arithmetic
        LayerNormalization(x)       ->  ReduceMean, Sub, Pow, ReduceMean, Sqrt, Div, Mul, Add
        GroupNormalization(x)       ->  Reshape, InstanceNormalization, Reshape, Mul, Add
        Attention(q, k, v)          ->  MatMul(Softmax(MatMul(q * scale, k^T)), v)
        Unsqueeze(x, axes)          ->  Unsqueeze<axes>(x), and so on for each older signature

    Applies when: the graph is of that opset or a later one, or of opset 23 for 24 and 25
    (``raise_ops`` brings older ones there). An operator that the opset has stays what it is; one
    that came later becomes what its definition says, in the spelling that exporters of that time
    used and compilers look for. Operators of other domains, and a vendor's own, are left alone.
    What cannot be said in the opset (bfloat16 where an operator had none, axes that are computed)
    is refused with node and reason, never approximated; only a Reshape to a computed shape is
    taken to ask for no size of 0, which before opset 14 it could not. Weights are not read. The
    file's IR version is lowered to the first that knows the opset.

    Numerics: reassociated (a composed operator rounds between its parts). In half precision the
    statistics of a norm are computed in float32, as ``stash_type`` says.

    Options:
        opset: the version of the standard operators, 11 to 25.

    Counts: ``operator``, those that are written in another way.

    Example:
        sdopt optimize BUNDLE --passes @fast,lower_opset=17 --stage opset17
    """

    opset: int

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    after: ClassVar[tuple[str, ...]] = (
        "clean",
        "raise_ops",
        "fuse_qkv",
        "pad_align",
        "lora",
        "cast_fp16",
        "cast_bf16",
        "cast_fp32",
        "cfg_parallel",
        "quantize",
        "tome",
        "hoist",
        "deep_cache",
        "quick_gelu",
        "flash_attention",
        "lower_attention",
        "lower_group_norm",
        "fuse_geglu",
    )

    def __post_init__(self) -> None:
        if not OLDEST <= self.opset <= NEWEST:
            raise ValueError(f"opset must be {OLDEST} to {NEWEST}, not {self.opset}")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Rewrite what the opset does not have, and say that the graph is of it."""
        write_in(model, self.opset, ctx)
