"""NaN and infinity in weights: found by reading every byte once, block by block."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sdopt import modelfile
from sdopt.weights import identity, read_blocks

_EXPONENTS = {
    ir.DataType.FLOAT16: (np.uint16, 0x7C00),
    ir.DataType.BFLOAT16: (np.uint16, 0x7F80),
}
"""Per half-precision type, an integer of its size and the bits that NaN and infinity have set.

Comparing those takes a quarter of the time of numpy's isfinite, which is faster for wider types.
"""

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class NonFinite:
    """A weight that holds numbers which are none.

    Attributes:
        name: the weight's.
        nan: how many are NaN.
        infinite: how many are infinite.
        size: how many numbers it holds in all.
    """

    name: str
    nan: int
    infinite: int
    size: int


def nonfinite(model: ir.Model, seen: dict[Hashable, NonFinite | None]) -> list[NonFinite]:
    """The weights of a graph that hold NaN or infinity.

    Each range of a file is read once: ``seen`` keeps what was found in it for other graphs.
    """
    found = []
    for value in modelfile.initializers(model):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in (*_EXPONENTS, *_WIDE):
            continue
        key = identity(tensor)
        if key not in seen:
            seen[key] = _count(str(value.name), tensor)
        if (one := seen[key]) is not None:
            found.append(one)
    return found


def _count(name: str, tensor: ir.TensorProtocol) -> NonFinite | None:
    nan = infinite = 0
    for block in read_blocks(tensor):
        if tensor.dtype in _EXPONENTS:
            kind, mask = _EXPONENTS[tensor.dtype]
            special = (np.ascontiguousarray(block).view(kind) & kind(mask)) == kind(mask)
        else:
            special = ~np.isfinite(block)
        if special.any():
            wrong = block[special].astype(np.float64)
            nan += int(np.isnan(wrong).sum())
            infinite += int(np.isinf(wrong).sum())
    return NonFinite(name, nan, infinite, tensor.size) if nan or infinite else None
