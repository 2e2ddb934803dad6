"""Operators whose signature or meaning changed, in the spelling of an older opset."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sdopt import graph
from sdopt.passes._lower_rules import Rules, refused
from sdopt.passes._raise_opset import REDUCTIONS

Rule = Callable[[Rules, ir.Node], None]


def _drop_inputs(node: ir.Node, count: int) -> None:
    node.resize_inputs(min(count, len(node.inputs)))


def _axes_as_attribute(version: int) -> Rule:
    """Reductions, Squeeze and Unsqueeze: the axes were an attribute before ``version``."""

    def rule(rules: Rules, node: ir.Node) -> None:
        if not rules.crosses(version):
            return
        axes = rules.constants(node, 1, "axes", version)
        if axes:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        elif graph.attribute(node, "noop_with_empty_axes", 0):
            rules.replace(node, rules.emit(node)("Identity", node.inputs[0]))
            return
        if axes is not None:
            _drop_inputs(node, 1)
            rules.mark(node)

    return rule


def _split(rules: Rules, node: ir.Node) -> None:
    if rules.crosses(18) and graph.attribute(node, "num_outputs") is not None:
        count = len(node.outputs)
        dims = rules.shapes.dims(node.inputs[0])
        size = dims[int(graph.attribute(node, "axis", 0))] if dims is not None else None
        del node.attributes["num_outputs"]
        rules.mark(node)
        if size is None or size.number % count:
            if size is None or size.known is None:
                raise refused(rules, node, "it splits a size that is not known", least=18)
            step = -(-size.known // count)
            parts = [min(step, size.known - step * i) for i in range(count)]
            node.resize_inputs(2)
            node.replace_input_with(1, rules.emit(node).const(parts))
    if rules.crosses(13):
        sizes = rules.constants(node, 1, "sizes", 13)
        if sizes is not None:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
            _drop_inputs(node, 1)
            rules.mark(node)


def _softmax(rules: Rules, node: ir.Node) -> None:
    """Until opset 12 all axes from ``axis`` on were one, so only the last one means the same."""
    if not rules.crosses(13):
        return
    axis = int(graph.attribute(node, "axis", -1))
    rank = rules.rank(node.inputs[0])
    if rank is None and axis != -1:
        raise refused(rules, node, "the number of axes of its input is not known", least=13)
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        return
    emit, order = rules.emit(node), list(range(rank or 0))
    order[axis], order[-1] = order[-1], order[axis]
    soft = emit(node.op_type, emit("Transpose", node.inputs[0], perm=order), axis=-1)
    rules.replace(node, emit("Transpose", soft, perm=order))


def _reshape(rules: Rules, node: ir.Node) -> None:
    """A 0 copied a size before ``allowzero``; a computed shape has none but of an empty tensor."""
    if rules.crosses(14) and graph.attribute(node, "allowzero", 0):
        target = graph.constant(node.inputs[1])
        if target is not None and not np.all(target):
            raise refused(rules, node, "it asks for a size of 0", least=14)
        del node.attributes["allowzero"]


def _shape(rules: Rules, node: ir.Node) -> None:
    if not rules.crosses(15):
        return
    start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end")
    node.attributes.pop("start", None)
    node.attributes.pop("end", None)
    if start or end is not None:
        emit = rules.emit(node)
        last = np.iinfo(np.int64).max if end is None else end
        cut = (emit.const([start]), emit.const([last]), emit.const([0]))
        rules.replace(node, emit("Slice", emit("Shape", node.inputs[0]), *cut))


def _constant(rules: Rules, node: ir.Node) -> None:
    if rules.crosses(12) and "value" not in node.attributes:
        tensor = graph.constant_tensor(node)
        if tensor is None:
            raise refused(rules, node, "it holds text or a sparse tensor", least=12)
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
        rules.mark(node)


def _resize(rules: Rules, node: ir.Node) -> None:
    """Until opset 12 empty tensors stood for what is left out; until 17 every axis was given."""
    if rules.crosses(18) and (axes := graph.attribute(node, "axes")) is not None:
        _resize_every_axis(rules, node, list(axes))
    mode = graph.attribute(node, "coordinate_transformation_mode")
    if rules.crosses(19) and mode == "half_pixel_symmetric":
        raise refused(rules, node, "half_pixel_symmetric came later", least=19)
    if rules.crosses(13):
        emit = rules.emit(node)
        node.resize_inputs(max(3, len(node.inputs)))
        for index in (1, 2):
            if node.inputs[index] is None:
                node.replace_input_with(index, emit.const([], np.float32))
                rules.mark(node)


def _resize_every_axis(rules: Rules, node: ir.Node, axes: list[int]) -> None:
    rank, emit = rules.rank(node.inputs[0]), rules.emit(node)
    if rank is None:
        raise refused(rules, node, "the number of axes of its input is not known", least=18)
    index = 3 if len(node.inputs) > 3 and node.inputs[3] is not None else 2
    given = graph.constant(node.inputs[index])
    places = [axis % rank for axis in axes]
    if given is None:
        raise refused(rules, node, "the sizes of some axes are computed", least=18)
    if index == 2:
        whole = np.ones(rank, np.float32)
        whole[places] = given
        node.replace_input_with(2, emit.const(whole, np.float32))
    else:
        sizes = [dim.known for dim in rules.shapes.dims(node.inputs[0]) or ()]
        for place, number in zip(places, given, strict=True):
            sizes[place] = int(number)
        if None in sizes:
            raise refused(rules, node, "it keeps axes of unknown size", least=18)
        node.replace_input_with(3, emit.const(sizes))
    del node.attributes["axes"]
    rules.mark(node)


def _pad(rules: Rules, node: ir.Node) -> None:
    if rules.crosses(19) and graph.attribute(node, "mode") == "wrap":
        raise refused(rules, node, "wrap came later", least=19)
    if not rules.crosses(18):
        return
    axes = rules.constants(node, 3, "axes", 18)
    if axes is None:
        return
    rank, pads = rules.rank(node.inputs[0]), rules.constants(node, 1, "pads", 18)
    if rank is None or pads is None:
        raise refused(rules, node, "the number of axes of its input is not known", least=18)
    whole = [0] * 2 * rank
    for place, axis in enumerate(axes):
        whole[axis % rank] = pads[place]
        whole[rank + axis % rank] = pads[len(axes) + place]
    node.replace_input_with(1, rules.emit(node).const(whole))
    _drop_inputs(node, 3)
    rules.mark(node)


def _pow(rules: Rules, node: ir.Node) -> None:
    """Until opset 11 the exponent was of the base's type."""
    base, exponent = (rules.shapes.dtype(value) for value in node.inputs)
    if rules.crosses(12) and base is not None and exponent != base:
        array = graph.constant(node.inputs[1])
        emit = rules.emit(node)
        same = (
            emit.const(array, base.numpy())
            if array is not None
            else emit("Cast", node.inputs[1], to=int(base))
        )
        node.replace_input_with(1, same)
        rules.mark(node)


def _extreme(rules: Rules, node: ir.Node) -> None:
    """Clip, Min and Max of whole numbers came with opset 12; Less and Where did not."""
    dtype = rules.shapes.dtype(node.inputs[0])
    if not rules.crosses(12) or dtype is None or not dtype.is_integer():
        return
    emit, (result, *rest) = rules.emit(node), node.inputs
    kinds = {"Clip": ("Less", "Greater"), "Max": ("Less",), "Min": ("Greater",)}[node.op_type]
    for index, other in enumerate(rest):
        if other is not None:
            kind = kinds[index % len(kinds)]
            result = emit("Where", emit(kind, result, other), other, result)
    rules.replace(node, emit("Identity", result) if result is node.inputs[0] else result)  # type: ignore[arg-type]


def _dropout(rules: Rules, node: ir.Node) -> None:
    """Handing its input on is all it does outside of training."""
    if not rules.crosses(12):
        return
    training = node.inputs[2] if len(node.inputs) > 2 else None
    array = graph.constant(training)
    mask = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if mask or (training is not None and (array is None or array.any())):
        raise refused(rules, node, "it is trained, or its mask is read", least=12)
    rules.replace(node, rules.emit(node)("Identity", node.inputs[0]))


def _grid_sample(rules: Rules, node: ir.Node) -> None:
    if rules.crosses(20):
        mode = graph.attribute(node, "mode", "linear")
        renamed = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
        node.attributes["mode"] = ir.AttrString("mode", renamed)
        if rules.rank(node.inputs[0]) != 4:
            raise refused(rules, node, "it samples volumes", least=20)


def _roi_align(rules: Rules, node: ir.Node) -> None:
    """Until opset 15 there was no choice of half a pixel, and runtimes differ in that."""
    if rules.crosses(16):
        raise refused(rules, node, "half a pixel was not said", least=16)


def _average_pool(rules: Rules, node: ir.Node) -> None:
    if rules.crosses(19) and graph.attribute(node, "ceil_mode", 0):
        raise refused(rules, node, "rounding a size up meant something else", least=19)


def _dequantize(rules: Rules, node: ir.Node) -> None:
    """A scale per channel came with opset 13; the type of integers without zero point with 21."""
    scale = rules.rank(node.inputs[1])
    if rules.crosses(13) and scale != 0:
        raise refused(rules, node, "it has a scale for each channel", least=13)
    wanted = graph.attribute(node, "output_dtype", 0)
    if node.op_type == "QuantizeLinear" and rules.crosses(21) and wanted:
        del node.attributes["output_dtype"]
        zero = ir.DataType(wanted)
        if len(node.inputs) < 3 or node.inputs[2] is None:
            dims = [dim.known for dim in rules.shapes.dims(node.inputs[1]) or ()]
            if None in dims:
                raise refused(rules, node, "the number of its scales is not known", least=21)
            node.resize_inputs(3)
            node.replace_input_with(2, rules.emit(node).const(np.zeros(dims), zero.numpy()))
            rules.mark(node)


RULES: dict[str, Rule] = {
    "Squeeze": _axes_as_attribute(13),
    "Unsqueeze": _axes_as_attribute(13),
    "ReduceSum": _axes_as_attribute(13),
    **dict.fromkeys(REDUCTIONS, _axes_as_attribute(18)),
    "Split": _split,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    "Reshape": _reshape,
    "Shape": _shape,
    "Constant": _constant,
    "Resize": _resize,
    "Pad": _pad,
    "Pow": _pow,
    **dict.fromkeys(("Clip", "Min", "Max"), _extreme),
    "Dropout": _dropout,
    "GridSample": _grid_sample,
    "RoiAlign": _roi_align,
    "AveragePool": _average_pool,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _dequantize),
}
