"""Where QuantizeLinear and DequantizeLinear go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sdopt.passes._layers import Layer
from sdopt.passes._quantizing import TOPS, Grid, quantize
from sdopt.passes.base import PassContext

_LOWEST, _HIGHEST = -128, 127


def weight(layer: Layer, grid: Grid, ctx: PassContext) -> None:
    """Let ``layer.holder`` read integers and scales; a Transpose stays behind them."""
    integers, scales = quantize(layer.tensor, grid)
    emit = ctx.emitter(layer.holder, layer.weight.name or "weight")
    parts = [emit.weight(integers, "integers"), emit.weight(scales, "scales")]
    made = emit("DequantizeLinear", *parts, axis=grid.axis)
    if grid.block and (node := made.producer()) is not None:
        node.attributes["block_size"] = ir.AttrInt64("block_size", grid.block)
    made.type, made.shape = ir.TensorType(layer.tensor.dtype), ir.Shape(layer.shape)
    layer.holder.replace_input_with(layer.slot, made)


def activations(
    model: ir.Model,
    layers: Sequence[Layer],
    ranges: Mapping[ir.Value, tuple[float, float]],
    kind: ir.DataType,
    ctx: PassContext,
) -> None:
    """Put one pair for each value in front of the first layer that reads it.

    Everything else that reads the value reads it as it was.
    """
    order = {node: index for index, node in enumerate(model.graph)}
    for value, (low, high) in ranges.items():
        readers = [layer.node for layer in layers if layer.x is value]
        anchor = min(readers, key=order.__getitem__)
        emit = ctx.emitter(anchor, f"{value.name}/quantize")
        dtype = next(layer.tensor.dtype for layer in layers if layer.x is value)
        scale, zero = scale_of(low, high, dtype.numpy(), kind)
        parameters = [emit.const(scale, dtype.numpy()), emit.const(zero, kind.numpy())]
        integers = emit("QuantizeLinear", value, *parameters)
        integers.type, integers.shape = ir.TensorType(kind), value.shape
        made = emit("DequantizeLinear", integers, *parameters)
        made.type, made.shape = ir.TensorType(dtype), value.shape
        for node in readers:
            node.replace_input_with(0, made)


def scale_of(
    low: float, high: float, dtype: np.dtype, kind: ir.DataType = ir.DataType.INT8
) -> tuple[float, int]:
    """Scale and zero point for a range that holds 0; of a symmetric range, as of fp8, it is 0."""
    symmetric = low == -high
    steps = TOPS[kind] if symmetric else _HIGHEST - _LOWEST
    scale = float(np.asarray((high if symmetric else high - low) / steps).astype(dtype))
    if scale == 0:
        return 1.0, 0  # nothing but zeros, or too small for the type
    zero = 0 if symmetric else round(_LOWEST - low / scale)
    return scale, int(np.clip(zero, _LOWEST, _HIGHEST))
