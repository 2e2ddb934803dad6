"""Sizes as products of numbers and unknowns, carried through a graph in one sweep.

Exporters leave most values without a shape and compute shapes with chains of operators. What a
pattern needs is whether two sizes are the same one, also where nobody knows the number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _raise_elements
from sdopt.passes._raise_dims import (
    ONE,
    Dim,
    Dims,
    broadcast,
    einsum_dims,
    named,
    over,
    resized,
    times,
)

_SAME = frozenset(
    {"Abs", "Cast", "CastLike", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Gelu"}
    | {"HardSigmoid", "Log", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg"}
    | {"Reciprocal", "Relu", "Selu", "Sigmoid", "Sin", "Softmax", "Softplus", "Sqrt"}
    | {"Swish", "Tanh", "Trilu", "InstanceNormalization", "BatchNormalization"}
    | {"GroupNormalization", "LayerNormalization", "RMSNormalization"}
)
_BROADCAST = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu"})
_COMPARES = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or"}
_BROADCAST |= _COMPARES
_ASKS = frozenset({"Not", "IsNaN", "IsInf"})
_SAME |= _ASKS
_QUANTIZE = frozenset({"QuantizeLinear", "DequantizeLinear"})
_TYPED_BY_FIRST = (
    _SAME | _BROADCAST | frozenset({"MatMul", "Conv", "Gemm", "Reshape", "Transpose"})
)
_TYPED_BY_FIRST |= {"Squeeze", "Unsqueeze", "Split", "Slice", "Concat", "Gather", "Expand"}
_TYPED_BY_FIRST |= {"Einsum", "Tile", "Sum", "ReduceSum", "Floor", "Ceil", "Round", "Range"}
_TYPED_BY_FIRST |= {"ReduceMean", "Attention", "AveragePool", "MaxPool", "Resize", "Pad"}

_AXES = 64
"""Of a tensor at most; a Reshape to more is a file that lies."""


class Shapes:
    """The sizes and element types of the values of ``main``, as far as they can be proven."""

    def __init__(self, main: ir.Graph) -> None:
        self._dims: dict[ir.Value, Dims | None] = {}
        self._elements: dict[ir.Value, Dims | None] = {}
        self._types: dict[ir.Value, ir.DataType | None] = {}
        for node in main:
            if node.domain in ("", "ai.onnx"):
                self._visit(node)

    def dims(self, value: ir.Value | None) -> Dims | None:
        """The dimensions, or None where not even their number is known."""
        if value is None:
            return None
        if value not in self._dims:
            self._dims[value] = _declared(value)
        return self._dims[value]

    def last(self, value: ir.Value | None) -> Dim | None:
        """The last dimension."""
        dims = self.dims(value)
        return dims[-1] if dims else None

    def elements(self, value: ir.Value | None) -> Dims | None:
        """What a small integer tensor holds, flattened."""
        if value is None:
            return None
        if value not in self._elements:
            array = graph.constant(value, most=16)
            whole = array is not None and array.dtype.kind in "iu"
            self._elements[value] = (
                [Dim(int(n)) for n in array.reshape(-1)] if whole and array is not None else None
            )
        return self._elements[value]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type."""
        if value is None:
            return None
        if value.dtype is not None:
            return value.dtype
        if value.const_value is not None:
            return value.const_value.dtype
        return self._types.get(value)

    def stands_for(self, new: ir.Value, old: ir.Value) -> None:
        """Let ``new`` have what is known of ``old``, and show it to whoever comes later."""
        dims, dtype = self.dims(old), self.dtype(old)
        self._dims[new], self._types[new] = dims, dtype
        new.type, new.shape = old.type, old.shape
        self.show(new)

    def declare(self, value: ir.Value, dims: Dims | None, dtype: ir.DataType | None) -> None:
        """Say what is known of a value that was just made, and show it."""
        self._dims[value], self._types[value] = dims, dtype
        self.show(value)

    def show(self, value: ir.Value) -> None:
        """Write the numbers among the dimensions where there is no shape."""
        dims, dtype = self.dims(value), self.dtype(value)
        if value.type is None and dtype is not None:
            value.type = ir.TensorType(dtype)
        if value.shape is None and dims is not None and value.type is not None:
            value.shape = ir.Shape([dim.known for dim in dims])

    def _visit(self, node: ir.Node) -> None:
        first = node.inputs[0] if node.inputs else None
        for index, output in enumerate(node.outputs):
            if node.op_type == "Cast":
                self._types[output] = ir.DataType(graph.attribute(node, "to"))
            elif node.op_type in ("CastLike", "Where", "DequantizeLinear"):
                self._types[output] = self.dtype(node.inputs[1])
            elif node.op_type == "Constant" and (tensor := graph.constant_tensor(node)):
                self._types[output] = tensor.dtype
            elif node.op_type in _COMPARES | _ASKS:
                self._types[output] = ir.DataType.BOOL
            elif node.op_type in _TYPED_BY_FIRST:
                self._types[output] = self.dtype(first)
            declared = _declared(output)
            try:
                found = self._infer(node, index)
            except (IndexError, StopIteration, ValueError, ZeroDivisionError):
                found = None  # ranks or axes that do not fit: no shape is right
            if found is not None and declared is not None and len(found) == len(declared):
                new = _fresh(output)
                found = [
                    b if b.known is not None or a == new(axis) else a
                    for axis, (a, b) in enumerate(zip(found, declared, strict=True))
                ]
            self._dims[output] = declared if found is None else found
        if len(node.outputs) == 1:
            elements = _raise_elements.evaluate(node, self)
            if elements is not None and len(elements) <= 16:
                self._elements[node.outputs[0]] = elements
                if len(self.dims(node.outputs[0]) or ()) == 1:
                    self._dims[node.outputs[0]] = [Dim(len(elements))]

    def _infer(self, node: ir.Node, index: int) -> Dims | None:
        op, dims = node.op_type, [self.dims(value) for value in node.inputs]
        first = dims[0] if dims else None
        if op == "Reshape":
            return self._reshape(node, first)
        if op == "Constant" and (tensor := graph.constant_tensor(node)) is not None:
            return [Dim(size) for size in tensor.shape.numpy()]
        if op == "ConstantOfShape":
            return self.elements(node.inputs[0])
        if op == "Range":
            given = [self.elements(value) for value in node.inputs]
            counted = given[0] == [Dim(0)] and given[2] == [ONE] and given[1] is not None
            return given[1] if counted else [_fresh(node.outputs[0])(0)]
        if op == "Gemm" and dims[1] is not None:
            row = 1 if graph.attribute(node, "transA", 0) else 0
            columns = 0 if graph.attribute(node, "transB", 0) else 1
            outer = first[row] if first is not None else _fresh(node.outputs[0])(0)
            return [outer, dims[1][columns]]
        if first is None:
            return None
        new = _fresh(node.outputs[index])
        if op == "Shape":
            span = slice(graph.attribute(node, "start", 0), graph.attribute(node, "end"))
            return [Dim(len(first[span]))]
        if op == "Resize":
            sizes = self.elements(node.inputs[3]) if len(node.inputs) > 3 else None
            scales = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
            return resized(first, sizes, scales, new)
        if op in _SAME | _QUANTIZE:
            return first if index == 0 else None
        if op in _BROADCAST:
            second = dims[1] if len(dims) > 1 else None
            return None if second is None else broadcast(first, second, new)
        if op == "Expand":
            target = self.elements(node.inputs[1])
            return None if target is None else broadcast(first, target, new)
        if op == "Where":
            a, b = dims[1:]
            return None if a is None or b is None else broadcast(broadcast(first, a, new), b, new)
        if op == "Gather" and dims[1] is not None:
            axis = graph.attribute(node, "axis", 0) % len(first)
            return [*first[:axis], *dims[1], *first[axis + 1 :]]
        if op == "Transpose":
            return [first[axis] for axis in graph.attribute(node, "perm", range(len(first))[::-1])]
        if op == "Einsum":
            return einsum_dims(str(graph.attribute(node, "equation", "")), dims, new)
        if op == "MatMul" and dims[1] is not None and len(first) > 1 and len(dims[1]) > 1:
            rows = broadcast(first[:-2], dims[1][:-2], new)
            return [*rows, first[-2], dims[1][-1]]
        if op == "Conv" and dims[1] is not None:
            return [first[0], dims[1][0], *(new(axis) for axis in range(2, len(first)))]
        if op in ("AveragePool", "MaxPool"):
            return [*first[:2], *(new(axis) for axis in range(2, len(first)))]
        if op in ("Resize", "Pad"):
            return [new(axis) for axis in range(len(first))]
        if op in ("Concat", "Split", "Slice"):
            return self._cut(node, first, dims, index)
        if op == "ReduceMean" and graph.attribute(node, "keepdims", 1):
            axes = self.axes(node)
            if axes is not None:
                return [ONE if i in axes else dim for i, dim in enumerate(first)]
        if op == "Unsqueeze" and (at := self._axes(node)) is not None:
            places = {int(a.number) % (len(first) + len(at)) for a in at}
            rest = iter(first)
            return [ONE if i in places else next(rest) for i in range(len(first) + len(at))]
        if op == "Attention" and len(first) == 4 and dims[2] is not None and index == 0:
            return [*first[:3], dims[2][-1]]
        return None

    def axes(self, node: ir.Node) -> set[int] | None:
        """The reduced axes of a Reduce, counted from 0."""
        first, given = self.dims(node.inputs[0]), self._axes(node)
        if first is None or given is None:
            return None
        return {int(axis.number) % len(first) for axis in given}

    def _axes(self, node: ir.Node) -> Dims | None:
        """The axes as they are given: an attribute in older opsets."""
        given = graph.attribute(node, "axes")
        if given is not None:
            return [Dim(int(axis)) for axis in given]
        return self.elements(node.inputs[1]) if len(node.inputs) > 1 else None

    def _reshape(self, node: ir.Node, first: Dims | None) -> Dims | None:
        target, new = self.elements(node.inputs[1]), _fresh(node.outputs[0])
        if target is None:
            length = self.dims(node.inputs[1])
            rank = length[0].known if length else None
            return [new(a) for a in range(rank)] if rank is not None and rank <= _AXES else None
        dims: list[Dim] = []
        for axis, dim in enumerate(target):
            if dim == Dim(0) and not graph.attribute(node, "allowzero", 0):
                dims.append(first[axis] if first is not None and axis < len(first) else new(axis))
            else:
                dims.append(dim)
        if (holes := [axis for axis, dim in enumerate(dims) if dim == Dim(-1)]) and first:
            total, taken = ONE, ONE
            for dim in first:
                total = times(total, dim)
            for dim in dims:
                taken = times(taken, dim) if dim != Dim(-1) else taken
            dims[holes[0]] = over(total, taken)
        return [new(axis) if dim == Dim(-1) else dim for axis, dim in enumerate(dims)]

    @staticmethod
    def _vagueness(dim: Dim) -> int:
        """Numbers before sizes that the graph's inputs name, those before all others."""
        named = all(isinstance(one, tuple) and one[0] == "name" for one in dim.unknowns)
        return 2 - named - (dim.known is not None)

    def _cut(
        self, node: ir.Node, first: Dims, dims: Sequence[Dims | None], index: int
    ) -> Dims | None:
        """Concat, Split and Slice: the cut axis gets a size of its own unless it is plain."""
        new = _fresh(node.outputs[index])
        if node.op_type == "Slice":
            given = self.elements(node.inputs[3]) if len(node.inputs) > 3 else None
            axes = None if given is None else {int(a.number) % len(first) for a in given}
            return [new(i) if axes is None or i in axes else dim for i, dim in enumerate(first)]
        axis = graph.attribute(node, "axis", 0) % len(first)
        size = new(axis)
        if node.op_type == "Concat":
            parts = [one[axis].known if one is not None else None for one in dims]
            numbers = [part for part in parts if part is not None]
            size = Dim(sum(numbers)) if len(numbers) == len(parts) else size
            # All parts agree on the other axes, so what is known of one is known of the first.
            whole = [one for one in dims if one is not None and len(one) == len(first)]
            first = [min(sizes, key=self._vagueness) for sizes in zip(*whole, strict=True)]
        elif len(node.inputs) > 1 and (sizes := self.elements(node.inputs[1])) is not None:
            size = sizes[index]
        return [*first[:axis], size, *first[axis + 1 :]]


def _declared(value: ir.Value) -> Dims | None:
    shape = value.shape
    if shape is None and value.const_value is not None:
        return [Dim(size) for size in value.const_value.shape.numpy()]
    if shape is None:
        return None
    new = _fresh(value)
    return [
        Dim(dim) if isinstance(dim, int) else named(dim.value) if dim.value else new(i)
        for i, dim in enumerate(shape)
    ]


def _fresh(value: ir.Value) -> Callable[[int], Dim]:
    return lambda axis: Dim(1, (("dim", id(value), axis),))
