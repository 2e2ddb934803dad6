"""fuse_skip_norm: sums inside the norms that follow, for tokens and for images."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.passes.fuse_skip_norm import FuseSkipNorm
from tests.microsoft_ops import standard
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run

TOLERANCE = {"float": 5e-6, "float16": 5e-3}
KINDS = pytest.mark.parametrize("kind", sorted(TOLERANCE))
BATCHES = pytest.mark.parametrize("batch", [1, 3])


def arrays(kind: str, **shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float16
    return {name: (rng.standard_normal(s) / 3).astype(dtype) for name, s in shapes.items()}


def shaped(model: ir.Model, kind: str, shapes: dict[str, list[int | str]]) -> ir.Model:
    dtype = ir.DataType.FLOAT if kind == "float" else ir.DataType.FLOAT16
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.type, value.shape = ir.TensorType(dtype), ir.Shape(shapes[value.name])
    return model


def tokens(kind: str = "float", *, read: bool = True, axis: int = -1) -> ir.Model:
    """``norm(x @ w + bias + skip)``, whose sum another residual may read."""
    second = "z" if read else "y"
    body = f"""
        m = MatMul(x, w)
        b = Add(bias, m)
        s = Add(skip, b)
        n = LayerNormalization<axis={axis}, epsilon=0.001>(s, g, h)
        y = MatMul(n, w)
        {"z = Add(s, y)" if read else ""}"""
    head = f"g ({kind}[B,S,8] x, {kind}[B,S,8] skip) => ({kind}[B,S,8] {second})"
    weights = arrays(kind, w=(8, 8), bias=(8,), g=(8,), h=(8,))
    model = model_of(f"{head} {{ {body} }}", weights)
    return shaped(model, kind, {name: ["B", "S", 8] for name in "mbsny"})


def image(kind: str = "float", *, skip: str = "B,H,W,8", bias: str = ", bias") -> ir.Model:
    """``GroupNorm(NhwcConv(x) + skip)``, as ``lower_channels_last`` leaves it."""
    body = f"""
        c = com.microsoft.NhwcConv(x, w{bias})
        s = Add(c, skip)
        n = com.microsoft.GroupNorm<groups=4, epsilon=0.00001, activation=1, channels_last=1>
            (s, g, h)
        y = Add(n, s)"""
    head = f"g ({kind}[B,H,W,8] x, {kind}[{skip}] skip) => ({kind}[B,H,W,8] y)"
    weights = arrays(kind, w=(8, 1, 1, 8)) | arrays("float", g=(8,), h=(8,))
    weights |= arrays(kind, bias=(8,)) if bias else {}
    model = model_of(f"{head} {{ {body} }}", weights)
    model.opset_imports["com.microsoft"] = 1
    return shaped(model, kind, {name: ["B", "H", "W", 8] for name in "csn"})


@KINDS
@BATCHES
@pytest.mark.parametrize("read", [True, False])
def test_tokens(kind: str, batch: int, read: bool) -> None:
    model, inputs = tokens(kind, read=read), arrays(kind, x=(batch, 5, 8), skip=(batch, 5, 8))
    wanted = run(tokens(kind, read=read), inputs)
    assert apply(FuseSkipNorm(), model).rewrites == {"layer_norm": 1}
    assert ops(model)["com.microsoft::SkipLayerNormalization"] == 1
    assert ops(model).get("Add", 0) == int(read)
    (norm,) = [n for n in model.graph if n.op_type == "SkipLayerNormalization"]
    assert len(norm.outputs) == (4 if read else 1)
    assert relative_l2(run(model, inputs)[0], wanted[0]) <= TOLERANCE[kind]


@KINDS
@BATCHES
@pytest.mark.parametrize("skip", ["B,H,W,8", "B,1,1,8"])
@pytest.mark.parametrize("bias", [", bias", ""])
def test_images(kind: str, batch: int, skip: str, bias: str) -> None:
    size = (batch, 4, 6, 8)
    inputs = arrays(kind, x=size, skip=size if "H" in skip else (batch, 1, 1, 8))
    before = image(kind, skip=skip, bias=bias)
    assert standard(before) == 2
    model = image(kind, skip=skip, bias=bias)
    assert apply(FuseSkipNorm(), model).rewrites == {"group_norm": 1}
    (conv,) = [n for n in model.graph if n.op_type == "NhwcConv"]
    (norm,) = [n for n in model.graph if n.op_type == "SkipGroupNorm"]
    assert len(conv.inputs) == 2, "the bias is added by the norm"
    assert len(norm.inputs) == (5 if bias else 4)
    assert standard(model) == 2
    assert relative_l2(run(model, inputs)[0], run(before, inputs)[0]) <= TOLERANCE[kind]


def test_a_bias_that_others_need_stays_in_the_convolution() -> None:
    model = image()
    (conv,) = [n for n in model.graph if n.op_type == "NhwcConv"]
    model.graph.outputs.append(conv.outputs[0])
    apply(FuseSkipNorm(), model)
    assert [len(n.inputs) for n in model.graph if n.op_type == "NhwcConv"] == [3]


def without_shapes() -> ir.Model:
    model = tokens()
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    return model


def doubled() -> ir.Model:
    body = "s = Add(x, x) y = LayerNormalization(s, g)"
    return model_of(f"g (float[B,8] x) => (float[B,8] y) {{ {body} }}", arrays("float", g=(8,)))


def scaled_by_input() -> ir.Model:
    body = "k = Neg(g) s = Add(x, z) y = LayerNormalization(s, k)"
    head = "g (float[2,8] x, float[2,8] z, float[8] g) => (float[2,8] y)"
    return model_of(f"{head} {{ {body} }}")


def plain() -> ir.Model:
    body = "y = LayerNormalization(x, g)"
    return model_of(f"g (float[B,8] x) => (float[B,8] y) {{ {body} }}", arrays("float", g=(8,)))


LEFT = {
    "shapes that are not known": (without_shapes, "not known"),
    "another shape": (lambda: image(skip="1,1,W,8"), "another shape"),
    "a value added to itself": (doubled, "added to itself"),
    "a norm over two axes": (lambda: tokens(axis=1), "last axis alone"),
    "a computed scale": (scaled_by_input, "computed, not a weight"),
    "nothing added": (plain, ""),
}


@pytest.mark.parametrize("case", sorted(LEFT))
def test_what_is_left_alone(case: str) -> None:
    build, reason = LEFT[case]
    leaves(FuseSkipNorm(), build(), reason)


@KINDS
@BATCHES
def test_biases_of_convolutions_on_both_sides_are_one(kind: str, batch: int) -> None:
    """A resnet's last convolution and that of its shortcut."""

    def two() -> ir.Model:
        body = """
            c = com.microsoft.NhwcConv(x, w, bias)
            d = com.microsoft.NhwcConv(z, v, other)
            s = Add(d, c)
            n = com.microsoft.GroupNorm<groups=4, epsilon=0.00001, activation=1, channels_last=1>
                (s, g, h)
            y = Add(n, s)"""
        weights = arrays(kind, w=(8, 1, 1, 8), v=(8, 1, 1, 8), bias=(8,), other=(8,))
        weights |= arrays("float", g=(8,), h=(8,))
        head = f"g ({kind}[B,H,W,8] x, {kind}[B,H,W,8] z) => ({kind}[B,H,W,8] y)"
        model = model_of(f"{head} {{ {body} }}", weights)
        model.opset_imports["com.microsoft"] = 1
        return shaped(model, kind, {name: ["B", "H", "W", 8] for name in "cdsn"})

    model, plain = two(), two()
    inputs = arrays(kind, x=(batch, 3, 4, 8), z=(batch, 3, 4, 8))
    assert apply(FuseSkipNorm(), model).rewrites == {"group_norm": 1}
    convs = [node for node in model.graph if node.op_type == "NhwcConv"]
    assert [len(node.inputs) for node in convs] == [2, 2]
    (norm,) = [node for node in model.graph if node.op_type == "SkipGroupNorm"]
    assert len(norm.inputs) == 5
    standard(model)
    standard(plain)
    wanted, found = run(plain, inputs)[0], run(model, inputs)[0]
    assert relative_l2(found, wanted) <= TOLERANCE[kind]


def pixels(kind: str = "float", *, bias: str = ", bias", shape: str = "flat") -> ir.Model:
    """A transformer's first norm: of a convolution's pixels as tokens."""
    body = f"""
        c = com.microsoft.NhwcConv(x, w{bias})
        s = Reshape(c, {shape})
        n = LayerNormalization<epsilon=0.001>(s, g, h)
        y = Add(n, s)"""
    head = f"g ({kind}[B,H,W,8] x) => ({kind}[B,S,8] y)"
    weights = arrays(kind, w=(8, 1, 1, 8), g=(8,), h=(8,)) | {"flat": np.array([0, -1, 8])}
    weights |= arrays(kind, bias=(8,)) if bias else {}
    model = model_of(f"{head} {{ {body} }}", weights)
    model.opset_imports["com.microsoft"] = 1
    shapes: dict[str, list[int | str]] = {"c": ["B", "H", "W", 8], "s": ["B", "S", 8]}
    return shaped(model, kind, shapes | {"n": ["B", "S", 8]})


@KINDS
@BATCHES
def test_the_bias_in_front_of_a_transformer(kind: str, batch: int) -> None:
    model, plain = pixels(kind), pixels(kind)
    assert apply(FuseSkipNorm(), model).rewrites == {"layer_norm": 1}
    assert ops(model)["com.microsoft::SkipLayerNormalization"] == 1
    (conv,) = [node for node in model.graph if node.op_type == "NhwcConv"]
    assert len(conv.inputs) == 2
    standard(model)
    standard(plain)
    for height, width in ((3, 4), (5, 2)):
        inputs = arrays(kind, x=(batch, height, width, 8))
        wanted, found = run(plain, inputs)[0], run(model, inputs)[0]
        assert relative_l2(found, wanted) <= TOLERANCE[kind]


def test_pixels_without_a_bias_are_left() -> None:
    leaves(FuseSkipNorm(), pixels(bias=""))
