"""Bringing a model of opset 9 to 22 to opset 23, operator by operator, without its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sdopt import graph, weights
from sdopt.passes import _raise_oldest as oldest
from sdopt.passes._raise_shapes import Shapes
from sdopt.passes.base import PassContext

OPSET = 23
OLDEST = 9
IR_VERSION = 10

_FLATTENING = frozenset({"Softmax", "LogSoftmax", "Hardmax"})
"""Until opset 12 they took all axes from ``axis`` (1 unless given) on as one."""

REDUCTIONS = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"}
    | {"ReduceMin", "ReduceProd", "ReduceSumSquare"}
)
"""Their axes became an input in opset 18; those of ReduceSum in opset 13."""

SAME_MEANING = frozenset(
    {"Abs", "Acos", "Acosh", "Add", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Cast"}
    | {"Bernoulli", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv"}
    | {"ConvTranspose", "Cos", "Cosh", "CumSum", "DeformConv", "DepthToSpace", "Det", "Div", "Elu"}
    | {"DequantizeLinear", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU"}
    | {"Gather", "GatherElements", "GatherND", "Gemm", "GlobalAveragePool", "GlobalLpPool"}
    | {"GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "If", "Identity"}
    | {"InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LeakyRelu", "Less", "Loop"}
    | {"LessOrEqual", "Log", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "MaxRoiPool"}
    | {"MaxUnpool", "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg"}
    | {"Multinomial", "NegativeLogLikelihoodLoss", "NonZero", "OptionalGetElement", "PRelu", "Pad"}
    | {"OptionalHasElement", "Pow", "QLinearMatMul", "QuantizeLinear", "RNN", "RandomNormal"}
    | {"RandomNormalLike", "RandomUniform", "RandomUniformLike", "Reciprocal", "Relu", "Reshape"}
    | {"Round", "Scan", "ScatterElements", "ScatterND", "Selu", "Shape", "Sigmoid", "Sign", "Sin"}
    | {"Sinh", "Size", "Slice", "SoftmaxCrossEntropyLoss", "Softplus", "Softsign", "SpaceToDepth"}
    | {"Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Tile", "Transpose", "Where"}
)
"""New versions since opset 11 took more types or an option that is off by default, no more."""


class _Upgrade:
    """The rules for the operators whose signature or meaning changed."""

    def __init__(self, model: ir.Model, ctx: PassContext) -> None:
        self.opset, self.ctx = graph.opset(model), ctx
        self.shapes = Shapes(model.graph)
        self.rules: dict[str, Callable[[ir.Node], None]] = {
            "Squeeze": self._axes_before(13),
            "Unsqueeze": self._axes_before(13),
            "ReduceSum": self._axes_before(13),
            **dict.fromkeys(REDUCTIONS, self._axes_before(18)),
            "Split": self._split,
            **dict.fromkeys(_FLATTENING, self._softmax),
            "Dropout": self._dropout,
            "Resize": self._resize,
            "GridSample": self._grid_sample,
            "RoiAlign": self._roi_align,
            "GroupNormalization": self._group_norm,
        }

    def refusal(self, node: ir.Node) -> str | None:
        """Why this node stands in the way, found before anything is changed."""
        name, opset = node.op_type, self.opset
        if not onnx.defs.has(name):
            return f"{name} is no operator of ONNX"
        try:
            old = onnx.defs.get_schema(name, opset)
            new = onnx.defs.get_schema(name, OPSET)
        except onnx.defs.SchemaError:
            return f"{name} is no operator of opset {opset}"
        if old.since_version == new.since_version:
            return f"{name} is deprecated" if new.deprecated else None
        if opset < oldest.FIRST and (reason := oldest.refusal(node)):
            return reason
        if name == "BatchNormalization":
            extra = graph.attribute(node, "training_mode", 0) or len(node.outputs) > 1
            return "a BatchNormalization is in training mode" if extra else None
        if name == "AveragePool":
            odd = graph.attribute(node, "ceil_mode", 0)
            return (
                "an AveragePool rounds its size up, which opset 19 defines anew" if odd else None
            )
        if name == "Resize":
            mode = graph.attribute(node, "coordinate_transformation_mode", "half_pixel")
            old_mode = mode == "tf_half_pixel_for_nn"
            return "a Resize has a mode that opset 13 dropped" if old_mode else None
        if name == "GroupNormalization" and not self._channels(node):
            return "the channels of a GroupNormalization are not known"
        known = name in self.rules or name in SAME_MEANING
        known = known or (opset < oldest.FIRST and name in oldest.KNOWN)
        return None if known else f"{name} is not known to mean the same in opset {OPSET}"

    def _axes_before(self, version: int) -> Callable[[ir.Node], None]:
        def rule(node: ir.Node) -> None:
            axes = graph.attribute(node, "axes")
            if self.opset < version and axes is not None:
                del node.attributes["axes"]
                self._add_input(node, 1, self.emit(node).const(list(axes)))

        return rule

    def _split(self, node: ir.Node) -> None:
        sizes = graph.attribute(node, "split")
        if sizes is not None:
            del node.attributes["split"]
            self._add_input(node, 1, self.emit(node).const(list(sizes)))
        elif (len(node.inputs) < 2 or node.inputs[1] is None) and self.opset < 18:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))

    def _softmax(self, node: ir.Node) -> None:
        """Until opset 12 all axes from ``axis`` on were one."""
        if self.opset >= 13:
            return
        axis, source, out = int(graph.attribute(node, "axis", 1)), node.inputs[0], node.outputs[0]
        dims = self.shapes.dims(source)
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        if source is None or axis == -1 or (dims is not None and axis == len(dims) - 1):
            return
        emit = self.emit(node)
        flat = emit("Flatten", source, axis=axis)
        soft = emit(node.op_type, flat, axis=-1)
        back = emit("Reshape", soft, emit("Shape", source))
        back.type, back.shape = out.type, out.shape
        graph.replace_uses(out, back)
        graph.remove_dead([node])

    def _dropout(self, node: ir.Node) -> None:
        """Without the input ``training_mode`` it hands its input on, as it did before."""
        node.attributes.pop("ratio", None)

    def _resize(self, node: ir.Node) -> None:
        """Opset 11 wanted empty tensors where opset 13 takes no input at all."""
        for index in (1, 2):
            if index < len(node.inputs):
                array = graph.constant(node.inputs[index])
                if array is not None and array.size == 0:
                    node.replace_input_with(index, None)

    def _grid_sample(self, node: ir.Node) -> None:
        mode = graph.attribute(node, "mode", "bilinear")
        if self.opset < 20:
            renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
            node.attributes["mode"] = ir.AttrString("mode", renamed)

    def _roi_align(self, node: ir.Node) -> None:
        """Until opset 15 no half pixel was taken off, and there was no choice."""
        if self.opset < 16:
            mode = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
            node.attributes[mode.name] = mode

    def _channels(self, node: ir.Node) -> int | None:
        dims = self.shapes.dims(node.inputs[0])
        return dims[1].known if dims is not None and len(dims) > 1 else None

    def _group_norm(self, node: ir.Node) -> None:
        """Until opset 20 there was one scale and one bias for each group."""
        if self.opset >= 21:
            return
        channels, groups = self._channels(node), int(graph.attribute(node, "num_groups"))
        assert channels is not None
        emit, each = self.emit(node), channels // groups
        for index, name in ((1, "scale"), (2, "bias")):
            array = graph.constant(node.inputs[index])
            if array is not None:
                tensor = ir.Tensor(array.reshape(groups).repeat(each))
                group = node.inputs[index]
                if group is not None and group.const_value is not None:
                    recipe = weights.Recipe("repeat", (group.const_value,), (("each", each),))
                    weights.made_by(tensor, recipe)
                node.replace_input_with(index, emit.weight(tensor, name))
                continue
            column = emit("Reshape", node.inputs[index], emit.const([groups, 1]))
            wide = emit("Expand", column, emit.const([groups, each]))
            node.replace_input_with(index, emit("Reshape", wide, emit.const([channels])))

    def emit(self, node: ir.Node) -> graph.Emitter:
        """Inserts nodes before ``node``."""
        return self.ctx.emitter(node, f"{graph.module_path(node)}/raise_ops")

    def _add_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, value)


def _refusals(model: ir.Model, ctx: PassContext) -> list[tuple[str, ir.Node]]:
    rules = _Upgrade(model, ctx)
    nodes = [node for node in graph.nodes(model) if node.domain in ("", "ai.onnx")]
    return [(reason, node) for node in nodes if (reason := rules.refusal(node))]


def _other_opset(model: ir.Model, opset: int) -> str | None:
    """Why the local functions cannot be inlined: they are written in another opset."""
    for function in model.functions.values():
        own = function.opset_imports.get("", opset)
        if own != opset:
            return f"opset {opset} stays: the local function {function.name} is of opset {own}"
    return None


def _inlined(model: ir.Model) -> ir.Model:
    InlinePass()(model)
    return model


def upgrade(model: ir.Model, ctx: PassContext) -> bool:
    """Bring ``model`` to opset 23, or say what stands in the way and leave it whole."""
    opset = graph.opset(model)
    if opset < OLDEST:
        ctx.skip(f"opset {opset} is not between {OLDEST} and {OPSET}", "model")
        return False
    inline = bool(model.functions)
    if inline and (reason := _other_opset(model, opset)):
        ctx.skip(reason, "model")
        return False
    # What is refused leaves the model whole, so its functions are inlined in a copy first.
    tried = _inlined(model.clone()) if inline else model
    found = _refusals(tried, ctx)
    for reason, node in found:
        ctx.skip(f"opset {opset} stays: {reason}", node)
    if found:
        return False
    if inline:
        ctx.count("local function inlined", len(model.functions))
        _inlined(model)
    rules = _Upgrade(model, ctx)
    nodes = [node for node in graph.nodes(model) if node.domain in ("", "ai.onnx")]
    for node in nodes:
        if opset < oldest.FIRST:
            oldest.rewrite(node, functools.partial(rules.emit, node), rules.shapes)
        if (rule := rules.rules.get(node.op_type)) is not None:
            rule(node)
    model.opset_imports[""] = OPSET
    model.opset_imports.pop("ai.onnx", None)
    model.ir_version = max(model.ir_version, IR_VERSION)
    ctx.count(f"opset {opset} to {OPSET}")
    return True
