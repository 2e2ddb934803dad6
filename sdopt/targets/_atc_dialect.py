"""What Ascend's ATC takes: the operators that its ONNX plug-ins register, and their limits.

Read off ``OriginOpType`` of every plug-in in ops-math (c4193324), ops-nn (e5c3fa93) and ops-cv
(6ae87653) of 2026-08, and the prototypes of MindIE's kernels. A node is looked up as
``ai.onnx::OPSET::OPERATOR`` with the opset of the model, so an operator that is registered for
opset 17 only does not exist in a model of opset 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from sdopt.targets.base import Dialect

OLDEST, NEWEST, MAX_IR = 11, 18, 8

_ALWAYS = (
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool "
    "BatchNormalization Cast Ceil Clip Compress Concat ConcatFromSequence Constant "
    "ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace Det Div Dropout Elu "
    "Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm "
    "GlobalAveragePool GlobalLpPool GlobalMaxPool Greater HardSigmoid Hardmax Identity If "
    "InstanceNormalization IsInf IsNaN LRN LSTM LeakyRelu Less Log LogSoftmax LpNormalization "
    "LpPool MatMul Max MaxPool MaxRoiPool MaxUnpool Mean MeanVarianceNormalization Min Mod "
    "Mul Multinomial Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow RandomNormal "
    "RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceLogSum "
    "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
    "Reshape Resize ReverseSequence RoiAlign Round ScatterElements ScatterND Selu SequenceAt "
    "SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Shrink "
    "Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split "
    "SplitToSequence Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Unique "
    "Unsqueeze Where Xor"
)
"""Registered for every opset from 11 to 18; Constant is read by the parser itself."""

REGISTERED: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(_ALWAYS.split(), (OLDEST, NEWEST)),
    "Bernoulli": (15, 18),
    "CastLike": (15, 18),
    "Celu": (12, 18),
    "Einsum": (12, 18),
    "GreaterOrEqual": (12, 18),
    "GridSample": (16, 18),
    "HardSwish": (14, 18),
    "LayerNormalization": (17, 18),
    "LessOrEqual": (12, 18),
    "Mish": (18, 18),
    "ReduceL1": (11, 17),
    "ReduceL2": (11, 17),
    "SoftmaxCrossEntropyLoss": (12, 18),
    "Trilu": (14, 18),
    **dict.fromkeys(("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"), (18, 18)),
}
"""Operators of ONNX to the first and last opset that they exist in and are registered for."""

_HALF, _LONG = ir.DataType.FLOAT16, ir.DataType.INT64


@dataclass(frozen=True)
class Kernel:
    """An operator of Ascend's own in the standard domain.

    Attributes:
        takes: per input the element types; those of an input beyond the last are free.
        gives: how many outputs it has.
        rank: of its first input.
        sizes: that the last axis of its first input may have; empty for all.
        must, may: attributes.
        fixed: whether it is compiled for fixed sizes.
    """

    takes: tuple[frozenset[ir.DataType], ...]
    gives: int = 1
    rank: tuple[int, ...] = ()
    sizes: frozenset[int] = frozenset()
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    fixed: bool = True


def _of(*types: ir.DataType) -> tuple[frozenset[ir.DataType], ...]:
    return tuple(frozenset({one}) for one in types)


_UNMERGE = Kernel(_of(_HALF, _LONG, _LONG, _LONG, _LONG), 1, (3,))

KERNELS: Mapping[str, Kernel] = {
    "FlashAttentionTik": Kernel(
        _of(_HALF, _HALF, _HALF), 1, (3, 4), frozenset({40, 48, 64, 72, 80, 128, 160, 512})
    ),
    "UnpadFlashAttentionMix": Kernel(_of(_HALF, _HALF, _HALF), 1, (4,), frozenset({40, 64})),
    "SliceTransGeluMul": Kernel(_of(_HALF), 1, (3,)),
    "FindMax": Kernel(_of(_HALF), 2, (3,)),
    "TomeMerged": Kernel(_of(_HALF, _HALF, _LONG, _LONG), 3, (3,)),
    "TomeUnmerge": _UNMERGE,
    "TomeUnmerged": _UNMERGE,
    "AscendQuant": Kernel(
        (frozenset({ir.DataType.FLOAT, _HALF}),),
        must=frozenset({"scale", "offset"}),
        may=frozenset({"round_mode", "sqrt_mode", "dst_type"}),
        fixed=False,
    ),
    "AscendDequant": Kernel(
        (frozenset({ir.DataType.INT32}), frozenset({ir.DataType.UINT64, _HALF})),
        may=frozenset({"dtype", "sqrt_mode", "relu_flag"}),
        fixed=False,
    ),
}

_QUANTIZED = (
    "ATC registers no QuantizeLinear and no DequantizeLinear; quantize=int8:... of "
    "whole layers becomes AscendQuant and AscendDequant, other quantization has no form there"
)

DIALECT = Dialect(
    max_opset=NEWEST,
    max_ir=MAX_IR,
    min_opset=OLDEST,
    domains=frozenset(),
    refused={"QuantizeLinear": _QUANTIZED, "DequantizeLinear": _QUANTIZED},
    known=frozenset(REGISTERED) | frozenset(KERNELS),
    dtypes=frozenset(
        {ir.DataType.FLOAT, _HALF, ir.DataType.DOUBLE, ir.DataType.BOOL, ir.DataType.INT8}
        | {ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.INT32, _LONG, ir.DataType.UINT64}
    ),
)


def illegal(node: ir.Node, opset: int) -> str | None:
    """Why ATC would refuse a node of a model in that opset, beyond what ``DIALECT`` says."""
    if (kernel := KERNELS.get(node.op_type)) is not None:
        return _illegal_kernel(node, kernel)
    low, high = REGISTERED[node.op_type]
    if not low <= opset <= high:
        return f"it is registered for opset {low} to {high}, and the graph is of {opset}"
    schema = onnx.defs.get_schema(node.op_type, opset)
    if strange := [name for name in node.attributes if name not in schema.attributes]:
        return f"in opset {opset} it has no attribute {strange[0]}"
    if len(node.inputs) > schema.max_input:
        return (
            f"in opset {opset} it takes {schema.max_input} inputs, and it has {len(node.inputs)}"
        )
    if any(isinstance(value.type, ir.OptionalType) for value in node.outputs):
        return "it makes an optional value"
    return None


def illegal_input(value: ir.Value) -> str | None:
    """Why a graph input cannot be named or fed on ATC's command line."""
    name = value.name or ""
    if any(mark in name for mark in ":;, \"'"):
        return "its name holds a mark that --input_shape is written with"
    if value.shape is None:
        return "its number of axes is not known"
    if value.dtype not in DIALECT.dtypes:
        return f"it is {value.dtype.name.lower() if value.dtype else 'of no known type'}"
    return None


def _illegal_kernel(node: ir.Node, kernel: Kernel) -> str | None:
    if missing := kernel.must - node.attributes.keys():
        return f"it lacks the attribute {min(missing)}"
    if strange := node.attributes.keys() - kernel.must - kernel.may:
        return f"it has no attribute {min(strange)}"
    if len(node.inputs) != len(kernel.takes) or None in node.inputs:
        return f"it takes {len(kernel.takes)} inputs, and it has {len(node.inputs)}"
    if len(node.outputs) != kernel.gives:
        return f"it gives {kernel.gives} outputs, and it has {len(node.outputs)}"
    for index, (value, types) in enumerate(zip(node.inputs, kernel.takes, strict=True)):
        if value is not None and value.dtype is not None and value.dtype not in types:
            wanted = " or ".join(sorted(one.name.lower() for one in types))
            return f"its input {index} is {value.dtype.name.lower()}, and it takes {wanted}"
    return _illegal_sizes(node, kernel)


def _illegal_sizes(node: ir.Node, kernel: Kernel) -> str | None:
    """The first input's sizes, or the first output's where only those are declared."""
    values = (node.inputs[0], node.outputs[0])
    shapes = [value.shape for value in values if value is not None and value.shape is not None]
    if not shapes:
        return "its sizes are not known"
    rank, last = len(shapes[0]), shapes[0][-1] if len(shapes[0]) else None
    if kernel.rank and rank not in kernel.rank:
        return f"its first input has {rank} axes"
    if kernel.fixed and not any(shape.is_static() for shape in shapes):
        return "its sizes are not fixed, and it is compiled for one size"
    if kernel.sizes and isinstance(last, int) and last not in kernel.sizes:
        return f"it has no head size {last}"
    return None
