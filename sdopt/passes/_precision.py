"""Moving a graph from float32 to a half type: who stays, where casts go, which weights change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sdopt import graph, weights

FLOAT = ir.DataType.FLOAT
HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_STASHING = frozenset({"LayerNormalization", "RMSNormalization", "GroupNormalization"})
_PERIODIC = frozenset({"Sin", "Cos"})
_COMPOUND = frozenset(
    {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase",
     "SequenceMap", "Optional"}
)  # fmt: skip
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_TO = {"Cast": "to", "RandomNormalLike": "dtype", "EyeLike": "dtype", "RandomNormal": "dtype"}
_MASK_READERS = frozenset({"Add", "Where", "Attention", "Expand", "Min", "Max", "Concat"})


def out_of_range(tensor: ir.TensorProtocol, half: ir.DataType) -> tuple[bool, bool]:
    """Whether values pass the half type's largest number, and whether only negative ones do.

    Reads the tensor block by block. The largest float16 is 65504.
    """
    limit = weights.largest(half)
    low, high = weights.extremes(tensor)
    return low < -limit or high > limit, high <= limit


def is_mask(value: ir.Value) -> bool:
    """Whether a constant is only added or selected, as the ``-inf`` of an attention mask is."""
    return all(user.op_type in _MASK_READERS for user in value.consumers())


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is a float32 tensor; constants answer by their tensor."""
    if value is None or is_compound(value):
        return False
    return (value.const_value.dtype if value.const_value is not None else value.dtype) == FLOAT


def is_compound(value: ir.Value | None) -> bool:
    """Whether a value is a sequence, or something that may be absent, and no plain tensor.

    What makes it decides: exporters leave values without a type, and onnx-ir's shape inference
    (1.1) then writes a sequence down as a tensor of its elements' type.
    """
    node = value.producer() if value is not None else None
    made = node is not None and not node.domain and node.op_type in _COMPOUND
    return made or (
        value is not None and isinstance(value.type, (ir.SequenceType, ir.OptionalType))
    )


def infer_types(model: ir.Model) -> None:
    """Let onnx state the types of values that an exporter left without one.

    Not strict: with a fixed batch onnx 1.23 takes the phases of a timestep for a shape, and then
    gives up the whole graph.
    """
    known = {value: (value.type, value.shape) for value in values(model) if is_compound(value)}
    ShapeInferencePass(strict_mode=False)(model)
    for value, (kind, shape) in known.items():
        value.type, value.shape = kind, shape


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the graph and of the bodies in it."""
    for one in model.graphs():
        yield from one.inputs
        yield from one.initializers.values()
        for node in one:
            yield from node.outputs


def is_half_already(model: ir.Model) -> bool:
    """Whether the model's weight matrices are in a half type."""
    tensors = (v.const_value for one in model.graphs() for v in one.initializers.values())
    return any(t is not None and t.dtype in HALVES and len(t.shape) > 1 for t in tensors)


def phase_nodes(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Sin, Cos and the arithmetic on floats that leads to them.

    Their argument is a phase such as ``timestep * frequency``: at 999 a half float is off by 0.25
    radians. PyTorch computes it in float32 too.
    """
    stack = [node for node in nodes if node.op_type in _PERIODIC]
    found: set[ir.Node] = set()
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        feeds = (v.producer() for v in node.inputs if v is not None)
        stack += [f for f in feeds if f is not None and any(map(is_float_like, f.outputs))]
    return found


def index_nodes(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Arithmetic in floats that makes integers out of integers, such as T5's position buckets.

    A half float rounds it to the next bucket. Data that is made an integer (quantized, say) is
    none of this: it comes from a float input or from weights.
    """
    found: set[ir.Node] = set()
    for seed in nodes:
        if seed.op_type != "Cast" or seed.outputs[0].dtype not in _INTEGERS:
            continue
        stack, chain = [seed], set[ir.Node]()
        while stack:
            node = stack.pop()
            floats = [v for v in node.inputs if v is not None and is_float_like(v)]
            if any(v.is_graph_input() or _is_weight(v) for v in floats):
                chain.clear()
                break
            chain.add(node)
            feeds = (v.producer() for v in floats)
            stack += [f for f in feeds if f is not None and f not in chain]
        found |= chain
    return found


def _is_weight(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) > 1


def is_float_like(value: ir.Value) -> bool:
    """Whether a computed value is float32, or of a type that the exporter did not state."""
    return value.dtype in (FLOAT, None)


class Types:
    """What the operator schemas allow in a half type."""

    def __init__(self, opset: int, half: ir.DataType) -> None:
        self._opset = opset
        self._word = {ir.DataType.FLOAT16: "tensor(float16)"}.get(half, "tensor(bfloat16)")
        self._cache: dict[tuple[str, str, int], tuple[list[bool], bool] | None] = {}

    def of(self, node: ir.Node) -> tuple[list[bool], bool] | None:
        """Whether each declared input may be half, and whether all outputs may; None: unknown."""
        key = (node.domain, node.op_type, len(node.outputs))
        if key not in self._cache:
            self._cache[key] = self._look_up(node)
        return self._cache[key]

    def _look_up(self, node: ir.Node) -> tuple[list[bool], bool] | None:
        if not onnx.defs.has(node.op_type, node.domain) or node.domain not in ("", "ai.onnx"):
            return None
        schema = onnx.defs.get_schema(node.op_type, self._opset, node.domain)
        inputs = [self._word in one.types for one in schema.inputs]
        outputs = [one.types for one in schema.outputs[: len(node.outputs)]]
        fits = all(self._word in t for t in outputs if "tensor(float)" in t)
        return inputs, fits

    def input_may_be_half(self, node: ir.Node, index: int) -> bool:
        """Whether that input's type is free to follow (``scales`` of Resize is not)."""
        known = self.of(node)
        if known is None or not known[0]:
            return known is not None
        return known[0][min(index, len(known[0]) - 1)]


class Caster:
    """Applies the decision: ``stays(node)`` nodes compute in float32, all others in ``half``."""

    def __init__(
        self,
        half: ir.DataType,
        types: Types,
        stays: Callable[[ir.Node], bool],
        saturated: frozenset[ir.Value],
        unique: Callable[[str], str],
    ) -> None:
        self._half = half
        self._types = types
        self._stays = stays
        self._saturated = saturated
        self.unique = unique
        self._made: dict[tuple[ir.Value, ir.DataType, ir.Graph], ir.Value] = {}
        self.casts = 0
        self.weights = 0

    def retype_outputs(self, node: ir.Node) -> None:
        """Give the outputs of a node that does not stay their half type."""
        if self._stays(node):
            return
        if (name := _TO.get(node.op_type)) and graph.attribute(node, name) == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(self._half))
        for name in ("value",) if node.op_type in ("Constant", "ConstantOfShape") else ():
            tensor = node.attributes[name].as_tensor() if name in node.attributes else None
            if tensor is not None and tensor.dtype == FLOAT:
                cast = weights.cast(tensor, self._half, saturate=True)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(cast.numpy(), self._half))
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor([0.0], self._half))
        if node.op_type != "Cast" or graph.attribute(node, "to") == self._half:
            # The statistics of a LayerNormalization are of stash_type, float32, by definition.
            stashed = node.op_type in _STASHING and graph.attribute(node, "stash_type", 1) == FLOAT
            for output in node.outputs[: 1 if stashed else None]:
                if is_float(output):
                    output.dtype = self._half

    def settle_inputs(self, node: ir.Node, was_float: Callable[[ir.Value], bool]) -> None:
        """Let a node read each float input in the type that it computes in."""
        if node.op_type == "Cast":
            return
        for index, value in enumerate(node.inputs):
            if value is None or not was_float(value):
                continue
            keep = self._stays(node) or not self._types.input_may_be_half(node, index)
            node.replace_input_with(index, self.view(value, FLOAT if keep else self._half, node))

    def view(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """``value`` in ``dtype``: itself, a weight cast while it is written, or a Cast node."""
        tensor = value.const_value
        if (tensor.dtype if tensor is not None else value.dtype) == dtype:
            return value
        fixed = tensor is not None and value.is_initializer() and not value.is_graph_input()
        home = value.graph if fixed else reader.graph
        if not isinstance(home, ir.Graph):
            raise TypeError("a node to cast for is in no graph")
        key = (value, dtype, home)
        if key not in self._made:
            if fixed and tensor is not None:
                made = weights.cast(tensor, dtype, saturate=value in self._saturated)
                name = self.unique(f"{value.name}.{dtype.name.lower()}")
                self._made[key] = graph.add_initializer(home, made, name)
                self.weights += 1
            else:
                emit = graph.Emitter(_first_reader(value, home, reader), self.unique, "cast")
                cast = emit("Cast", value, to=int(dtype))
                cast.type, cast.shape = ir.TensorType(dtype), value.shape
                self._made[key] = cast
                self.casts += 1
        return self._made[key]


def _first_reader(value: ir.Value, home: ir.Graph, reader: ir.Node) -> ir.Node:
    """The earliest reader of ``value`` in ``home``, where a shared Cast must stand."""
    readers = {user for user in value.consumers() if user.graph is home} | {reader}
    return reader if len(readers) == 1 else next(node for node in home if node in readers)
