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

    Applies when: the weights are float32. Nodes whose weights pass 65504 stay in float32 and are
    reported by module path; so do operators that have no fp16 form, and control flow.

    Numerics: lossy, small (relative L2 about 1e-3 on a UNet).

    Options:
        keep: what stays in float32, joined by ``+``: ``io`` (the graph's inputs and outputs), an
            operator (``GroupNormalization``), or a module path, ``*`` for one level
            (``up_blocks.3+mid_block.attentions.*``).
    """

    half: ClassVar[ir.DataType] = ir.DataType.FLOAT16
    narrow: ClassVar[bool] = True
