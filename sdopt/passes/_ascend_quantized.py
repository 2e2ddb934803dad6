"""Layers between QuantizeLinear and DequantizeLinear as AscendQuant, int8 layer, AscendDequant.

Source: the ONNX plug-ins and the operator prototype of Ascend's ops-nn (``ascend_quant``,
``ascend_dequant``): ``AscendQuant<scale, offset>(x)`` is ``round(x * scale + offset)`` as int8,
``AscendDequant<dtype>(x: int32, deq_scale: uint64)`` is ``x * deq_scale``, whose low 32 bits are a
float32. Both live in the standard domain.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt import graph, weights
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

OPERATORS = frozenset({"AscendQuant", "AscendDequant"})

_LAYERS = ("Conv", "MatMul", "Gemm")
_KIND = "quantized"
_TYPES = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 1}
"""AscendDequant's numbers for its result, ``DT_FLOAT`` and ``DT_FLOAT16``."""


def lower(model: ir.Model, shapes: Shapes, ctx: PassContext) -> None:
    """Rewrite every quantized layer of the main graph; what is left is skipped with its reason."""
    made: dict[tuple[ir.Value, float], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type not in _LAYERS or node.domain not in ("", "ai.onnx"):
            continue
        if _weight(node) is None and graph.producer(node.inputs[0], "DequantizeLinear") is None:
            continue
        if reason := _refusal(node, shapes):
            ctx.skip(reason, node, _KIND)
            continue
        _write(node, shapes, ctx, made)
        ctx.count(_KIND)
    graph.drop_unused_initializers(model)


def _weight(node: ir.Node) -> tuple[ir.Node, ir.Node | None] | None:
    """The DequantizeLinear of a layer's weight, and the Transpose behind it if there is one."""
    value = node.inputs[1]
    transpose = graph.producer(value, "Transpose")
    found = graph.producer(transpose.inputs[0] if transpose else value, "DequantizeLinear")
    return (found, transpose) if found is not None else None


def _refusal(node: ir.Node, shapes: Shapes) -> str | None:
    """Why a layer has no form with AscendQuant."""
    weight, dequantize = _weight(node), graph.producer(node.inputs[0], "DequantizeLinear")
    if dequantize is None:
        return "only its weights are quantized, and ATC has no DequantizeLinear for them"
    quantize = graph.producer(dequantize.inputs[0], "QuantizeLinear")
    if weight is None or quantize is None:
        return "its weights, or what it reads, are not quantized by a pair that is whole"
    if _scale(quantize) is None or _scale(quantize) != _scale(dequantize):
        return "the scale of what it reads is not one number"
    if not (_symmetric(quantize) and _symmetric(dequantize) and _symmetric(weight[0])):
        return "it has zero points: quantize with activations=symmetric"
    tensor, scales = (value.const_value if value else None for value in weight[0].inputs[:2])
    if tensor is None or scales is None or tensor.dtype != ir.DataType.INT8:
        return "its weights are not stored as int8 with known scales"
    if shapes.dtype(dequantize.inputs[1]) not in _TYPES:
        return "it computes in neither float32 nor float16"
    if scales.size not in (1, _channels(node, weight[1], tensor)):
        return "its weights do not have one scale, or one per output channel"
    if scales.size > 1 and not _is_outward(node, weight):
        return "the scales of its weights are not those of its output channels"
    if node.op_type == "MatMul" and len(shapes.dims(quantize.inputs[0]) or ()) == 4:
        return "AscendDequant takes the second of four axes for the channels, as after a Conv"
    if node.op_type == "Gemm" and any(
        graph.attribute(node, a, 1.0) != 1 for a in ("alpha", "beta")
    ):
        return "its alpha or beta is not 1"
    return None


def _output_axis(node: ir.Node, transpose: ir.Node | None) -> int:
    """The axis of the stored weight that holds the output channels."""
    if node.op_type == "Conv":
        return 0
    first = bool(graph.attribute(node, "transB", 0)) != (transpose is not None)
    return 0 if first else 1


def _channels(node: ir.Node, transpose: ir.Node | None, tensor: ir.TensorProtocol) -> int:
    return int(tensor.shape.numpy()[_output_axis(node, transpose)])


def _is_outward(node: ir.Node, weight: tuple[ir.Node, ir.Node | None]) -> bool:
    dequantize, transpose = weight
    if transpose is not None and list(graph.attribute(transpose, "perm", (1, 0))) != [1, 0]:
        return False
    axis = int(graph.attribute(dequantize, "axis", 1)) % _rank(dequantize)
    whole = not graph.attribute(dequantize, "block_size", 0)
    return whole and axis == _output_axis(node, transpose)


def _rank(dequantize: ir.Node) -> int:
    """The number of axes of a stored weight."""
    value = dequantize.inputs[0]
    if value is None or value.const_value is None:
        raise TypeError("only stored weights are asked for")
    return len(value.const_value.shape)


def _scale(node: ir.Node) -> float | None:
    return graph.scalar(node.inputs[1])


def _symmetric(node: ir.Node) -> bool:
    """Whether a zero point is missing, or zero; one of int8."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None:
        wanted = graph.attribute(node, "output_dtype", ir.DataType.UINT8)
        return node.op_type == "DequantizeLinear" or wanted == ir.DataType.INT8
    array = graph.constant(point, most=1 << 16)
    return array is not None and array.dtype == np.int8 and not array.any()


def _write(
    node: ir.Node, shapes: Shapes, ctx: PassContext, made: dict[tuple[ir.Value, float], ir.Value]
) -> None:
    found, dequantize = _weight(node), graph.producer(node.inputs[0], "DequantizeLinear")
    assert found is not None
    assert dequantize is not None
    quantize = graph.producer(dequantize.inputs[0], "QuantizeLinear")
    assert quantize is not None
    (holder, transpose), x, scale = found, quantize.inputs[0], _scale(quantize)
    assert x is not None
    assert scale is not None
    # ONNX gives a dequantized value the type of its scale.
    dtype, out = shapes.dtype(dequantize.inputs[1]) or ir.DataType.FLOAT, node.outputs[0]
    emit = ctx.emitter(node, f"{graph.module_path(node)}/lower_ascend")
    if (x, scale) not in made:
        near = ctx.emitter(quantize, f"{graph.module_path(node)}/lower_ascend")
        small = near("AscendQuant", x, scale=1 / scale, offset=0.0)
        small.type, small.shape = ir.TensorType(ir.DataType.INT8), x.shape
        made[x, scale] = small
    weight = holder.inputs[0]
    if transpose is not None:
        weight = emit("Transpose", weight, perm=[1, 0])
        weight.type = ir.TensorType(ir.DataType.INT8)
    attributes = {k: a.value for k, a in node.attributes.items() if k not in ("alpha", "beta")}
    total = emit(node.op_type, made[x, scale], weight, **attributes)
    total.type, total.shape = ir.TensorType(ir.DataType.INT32), out.shape
    scales = holder.inputs[1].const_value if holder.inputs[1] is not None else None
    assert scales is not None
    bits = _bits(scales, scale)
    result = emit("AscendDequant", total, emit.weight(bits, "deq_scale"), dtype=_TYPES[dtype])
    result.type, result.shape = ir.TensorType(dtype), out.shape
    if len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        if node.op_type == "Conv" and bias.const_value is not None:
            column = [bias.const_value.size, *[1] * (_rank(holder) - 2)]
            bias = emit.weight(weights.reshaped(bias.const_value, column), "bias")
        result = emit("Add", result, bias)
    shapes.stands_for(result, out)
    graph.replace_uses(out, result)
    graph.remove_dead([node])


def _bits(scales: ir.TensorProtocol, scale: float) -> ir.TensorProtocol:
    """The product of both scales as AscendDequant takes it, one axis, computed when written."""

    def blocks() -> weights.Blocks:
        for block in weights.read_blocks(scales):
            product = (block.astype(np.float32) * np.float32(scale)).astype(np.float32)
            yield product.view(np.uint32).astype(np.uint64)

    recipe = weights.Recipe("dequantize_bits", (scales,), (("scale", scale),))
    size = [int(scales.size)]
    return weights.BlockTensor(blocks, ir.DataType.UINT64, size, "deq_scale", recipe)
