"""``cast_fp16``: half-precision weights and arithmetic, with a keep-list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt.passes._casting import HalfCast


@dataclass(frozen=True)
class CastFp16(HalfCast):
    """Compute in float16; weights are cast while they are written, never held.

    Before / After:
        fp32 weight, fp32 arithmetic      ->  fp16 weight, fp16 arithmetic
        sin and cos of the timestep       ->  as they were, a Cast behind them
        -inf in a mask                    ->  -65504

    Applies when: the weights are float32. The phase that sin and cos of the timestep take stays in
    float32, since at 999 a float16 is off by a quarter of a radian; so does arithmetic that makes
    integers of integers (T5's buckets of positions). Nodes whose weights pass 65504 stay in
    float32 too and are reported by module path; so are operators that have no fp16 form, and
    control flow.

    Numerics: lossy, small (relative L2 about 1e-3 on a UNet).

    Options:
        keep: what stays in float32, joined by ``+``: ``io`` (the graph's inputs and outputs), an
            operator (``GroupNormalization``), or a module path, ``*`` for one level
            (``up_blocks.3+mid_block.attentions.*``).

    Counts: ``node``, those that compute in float16; left are those that have no such form or whose
    weights do not fit. What ``keep`` names, and the phase of the timestep, are not counted.

    Example:
        sdopt optimize BUNDLE --passes clean,fuse_qkv,cast_fp16:keep=io+mid_block
    """

    half: ClassVar[ir.DataType] = ir.DataType.FLOAT16
    narrow: ClassVar[bool] = True
