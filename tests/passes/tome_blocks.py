"""One transformer block over a feature map, written out in many forms, for the tome tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE

FORMS: Mapping[str, Mapping[str, Any]] = {
    "as exported": {},
    "projections with biases, scaled output": {"bias": True, "scaled": True},
    "attention on [batch, tokens, channels]": {"layout": "3d"},
    "flatten, then transpose": {"flatten_first": True},
    "a token count baked into the Reshapes": {"tokens": "baked"},
    "a token count computed from the map": {"tokens": "computed"},
    "weights stored as [in, out]": {"stored_transposed": True},
    "tokens projected after flattening": {"linear_in": True},
    "second block of a transformer": {"earlier_add": True},
}

_OTHER = "its keys or values come from another input than its queries"
_RESIDUAL = "no residual Add of the norm's input follows its output projection"

NEAR_MISSES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no residual": ({"residual": "none"}, _RESIDUAL),
    "the residual of another value": ({"residual": "other"}, _RESIDUAL),
    "no output projection": ({"project_out": False}, _RESIDUAL),
    "an output that is read twice": ({"read_twice": True}, _RESIDUAL),
    "cross-attention": ({"keys": "context", "values": "context"}, _OTHER),
    "k from another input": ({"keys": "hidden"}, _OTHER),
    "the vae's attention, behind a GroupNormalization": (
        {"norm": "group"},
        "no LayerNormalization precedes its projections",
    ),
    "a mask": (
        {"mask": True},
        "it has a mask or a cache, which depends on token positions",
    ),
    "tokens that are no image's": (
        {"tokens_from": "input"},
        "its tokens do not come from a [batch, channels, height, width] map",
    ),
    "q that is no projection": (
        {"project_q": False},
        "its q, k and v are no linear projections of one input",
    ),
}


class _Writer:
    """Nodes, initializers and inputs of a graph under construction."""

    def __init__(self, kind: ir.DataType, weights_from: ir.DataType) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.draw = np.random.default_rng(3)
        self.kind = kind
        self.weights_from = weights_from

    def __call__(
        self, op: str, *inputs: ir.Value | None, name: str = "", **attrs: Any
    ) -> ir.Value:
        node = ir.node(op, list(inputs), attrs, name=name or f"{op}_{len(self.nodes)}")
        out = node.outputs[0]
        out.name = f"{node.name}_out"
        out.type = ir.TensorType(ir.DataType.INT64 if op == "Shape" else self.kind)
        self.nodes.append(node)
        return out

    def tensor(self, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=f"w{len(self.initializers)}", const_value=ir.tensor(array))
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        self.initializers.append(value)
        return value

    def real(self, *shape: int, scale: float = 0.5) -> ir.Value:
        array = self.draw.standard_normal(shape) * scale
        return self.cast(array)

    def cast(self, array: np.ndarray) -> ir.Value:
        return self.tensor(array.astype(self.weights_from.numpy()).astype(self.kind.numpy()))

    def ints(self, *numbers: int) -> ir.Value:
        return self.tensor(np.array(numbers, np.int64))


def feed(batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {"sample": draw.standard_normal((batch, 4, height, width)).astype(np.float32)}


def model(
    *,
    kind: str = "FLOAT",
    weights_from: str = "",
    layout: str = "4d",
    tokens: str = "free",
    tokens_from: str = "map",
    norm: str = "layer",
    norm_scale: float = 1,
    keys: str = "normed",
    values: str = "normed",
    residual: str = "hidden",
    flatten_first: bool = False,
    linear_in: bool = False,
    earlier_add: bool = False,
    bias: bool = False,
    scaled: bool = False,
    stored_transposed: bool = False,
    project_q: bool = True,
    project_out: bool = True,
    read_twice: bool = False,
    mask: bool = False,
    map_bias: bool = True,
    pointwise: bool = False,
    size: tuple[int, int, int] | None = None,
) -> ir.Model:
    """``hidden + to_out(attend(norm(hidden)))`` with each change a near miss or another form.

    Weights are drawn in a fixed order before anything is built, so all forms hold the same ones.
    ``size`` is a fixed batch, height and width; without it they are dynamic.
    """
    batch, height, across = size or ("B", "H", "W")
    count: int | str = size[1] * size[2] if size else "N"
    write = _Writer(ir.DataType[kind], ir.DataType[weights_from or kind])
    real = write.kind
    conv = [write.real(WIDTH, 4, 3, 3), write.real(WIDTH)]
    matrices = {name: write.draw.standard_normal((WIDTH, WIDTH)) / 3 for name in "qkvo"}
    extra = write.draw.standard_normal((WIDTH, WIDTH)) / 3
    latent = ir.Shape([batch, 4, height, across])
    sample = ir.Value(name="sample", type=ir.TensorType(real), shape=latent)
    sequence = ir.Value(
        name="sequence", type=ir.TensorType(real), shape=ir.Shape([batch, count, WIDTH])
    )

    def linear(x: ir.Value, matrix: np.ndarray) -> ir.Value:
        if stored_transposed:
            out = write("MatMul", x, write.cast(np.ascontiguousarray(matrix.T)))
        else:
            out = write("MatMul", x, write("Transpose", write.cast(matrix), perm=[1, 0]))
        return write("Add", out, write.cast(np.zeros(WIDTH))) if bias else out

    if pointwise:
        conv[0], pads = write.real(WIDTH, 4, 1, 1), [0, 0, 0, 0]
    else:
        pads = [1, 1, 1, 1]
    image = write("Conv", sample, *(conv if map_bias else conv[:1]), pads=pads)
    image.shape = ir.Shape([batch, WIDTH, height, across])
    hidden = sequence
    if tokens_from == "map" and flatten_first:
        flat = write("Reshape", image, write.ints(0, WIDTH, -1))
        hidden = write("Transpose", flat, perm=[0, 2, 1])
    elif tokens_from == "map":
        last = write("Transpose", image, perm=[0, 2, 3, 1])
        hidden = write("Reshape", last, write.ints(0, -1, WIDTH))
    if linear_in:
        hidden = linear(hidden, np.eye(WIDTH))
    if earlier_add:
        hidden = write(
            "Add", hidden, write("Mul", write("Sigmoid", hidden), write.cast(np.zeros(1)))
        )
    hidden.shape = ir.Shape([batch, count, WIDTH])
    if norm == "layer":
        ones, zeros = np.full(WIDTH, norm_scale), np.zeros(WIDTH)
        normed = write("LayerNormalization", hidden, write.cast(ones), write.cast(zeros), axis=-1)
    else:
        scale = [write.cast(np.ones(WIDTH)), write.cast(np.zeros(WIDTH))]
        mapped = write("GroupNormalization", image, *scale, num_groups=4)
        last = write("Transpose", mapped, perm=[0, 2, 3, 1])
        normed = write("Reshape", last, write.ints(0, -1, WIDTH))
    normed.shape = ir.Shape([batch, count, WIDTH])

    sources = {"normed": normed, "hidden": hidden, "context": sequence}
    parts = [
        linear(normed, matrices["q"]) if project_q else normed,
        linear(sources[keys], matrices["k"]),
        linear(sources[values], matrices["v"]),
    ]

    def target(*dims: int) -> ir.Value:
        if tokens == "free":
            return write.ints(0, -1, *dims)
        if tokens == "baked":
            return write.ints(2, 90, *dims)
        first = write("Shape", sample, start=0, end=1)
        area = write("ReduceProd", write("Shape", image, start=2), write.ints(0), keepdims=1)
        area.type = ir.TensorType(ir.DataType.INT64)
        whole = write("Concat", first, area, *[write.ints(dim) for dim in dims], axis=0)
        whole.type = ir.TensorType(ir.DataType.INT64)
        return whole

    allowed = write.cast(np.zeros((1, 1))) if mask else None
    if layout == "4d":
        heads = [write("Reshape", part, target(HEADS, SIZE)) for part in parts]
        heads = [write("Transpose", part, perm=[0, 2, 1, 3]) for part in heads]
        attended = write("Attention", *heads, *([allowed] if mask else []), name="attend")
        out = write("Transpose", attended, perm=[0, 2, 1, 3])
        out = write("Reshape", out, target(WIDTH))
    else:
        out = write("Attention", *parts, name="attend", q_num_heads=HEADS, kv_num_heads=HEADS)
    if project_out:
        out = linear(out, matrices["o"])
    if scaled:
        out = write("Div", write("Identity", out), write.cast(np.array(1)))
    before = out
    if residual != "none":
        other = {"hidden": hidden, "other": write("MatMul", hidden, write.cast(extra))}[residual]
        out = write("Add", out, other)
    if read_twice:
        out = write("Add", out, write("Sigmoid", before))
    out.shape = ir.Shape([batch, count, WIDTH])
    needs_sequence = tokens_from == "input" or "context" in (keys, values)
    main = ir.Graph(
        [sample, sequence] if needs_sequence else [sample],
        [out],
        nodes=write.nodes,
        initializers=write.initializers,
        opset_imports={"": 23},
        name="block",
    )
    return ir.Model(main, ir_version=10)
