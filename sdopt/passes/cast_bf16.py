"""``cast_bf16``: bfloat16 weights and arithmetic, with a keep-list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt.passes._casting import HalfCast


@dataclass(frozen=True)
class CastBf16(HalfCast):
    """Compute in bfloat16; weights are cast while they are written, never held.

    Before / After:
        fp32 weight, fp32 arithmetic      ->  bf16 weight, bf16 arithmetic
        sin and cos of the timestep       ->  as they were, a Cast behind them
        -inf in a mask                    ->  the lowest bfloat16, about -3.39e38

    Applies when: the weights are float32; their size does not matter, since bfloat16 has the
    range of float32. Operators that have no bf16 form in the graph's opset stay in float32 and
    are reported by module path (Conv has one from opset 22 on); so does control flow. It is for
    runtimes that compute in bfloat16: ONNX Runtime's CPU has few kernels of that type.

    Numerics: lossy (8 bits of mantissa: relative L2 about eight times that of ``cast_fp16``).

    Options:
        keep: what stays in float32, joined by ``+``: ``io`` (the graph's inputs and outputs), an
            operator (``GroupNormalization``), or a module path, ``*`` for one level
            (``up_blocks.3+mid_block.attentions.*``).

    Counts: ``node``, those that compute in bfloat16; left are those that have no such form.
    What ``keep`` names, and the phase of the timestep, are not counted.

    Example:
        sdopt optimize BUNDLE --passes clean,fuse_qkv,cast_bf16:keep=io+mid_block
    """

    half: ClassVar[ir.DataType] = ir.DataType.BFLOAT16
    narrow: ClassVar[bool] = False
