"""lower_channels_last: NHWC kernels, checked through what their definitions say."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.passes.base import PassContext
from sdopt.passes.lower_channels_last import LowerChannelsLast
from tests.microsoft_ops import standard
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run

TOLERANCE = {"float": 5e-6, "float16": 5e-3}
KINDS = pytest.mark.parametrize("kind", sorted(TOLERANCE))
SIZES = pytest.mark.parametrize("size", [(2, 6, 4), (3, 5, 7)])


def arrays(kind: str, **shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float16
    return {name: (rng.standard_normal(s) / 3).astype(dtype) for name, s in shapes.items()}


def resnet(kind: str = "float") -> ir.Model:
    """A resnet block with a time embedding, a skip connection, and tokens made of its result."""
    weights = arrays(
        kind,
        w1=(8, 4, 3, 3),
        b1=(8,),
        w2=(8, 8, 3, 3),
        w3=(8, 4, 1, 1),
        g=(8,),
        h=(8,),
        mean=(8, 1, 1),
    )
    weights |= {
        "zoom": np.array([1, 1, 2, 2], np.float32),
        "two": np.array([2]),
        "three": np.array([3]),
        "flat": np.array([0, -1, 8]),
        "pads": np.array([0, 0, 0, 0, 0, 0, 1, 2]),
    }
    body = """
        c = Conv<pads=[1,1,1,1]>(x, w1, b1)
        u = Unsqueeze(t, two)
        e = Unsqueeze(u, three)
        s = Add(c, e)
        n = GroupNormalization<num_groups=4, epsilon=0.00001>(s, g, h)
        z = Sigmoid(n)
        a = Mul(n, z)
        d = Conv<pads=[1,1,1,1]>(a, w2)
        f = Conv(x, w3, b1)
        r = Add(f, d)
        m = Sub(r, mean)
        up = Resize<mode="nearest", coordinate_transformation_mode="asymmetric",
                    nearest_mode="floor">(m, , zoom)
        p = Pad(up, pads)
        both = Concat<axis=1>(p, p)
        o = Transpose<perm=[0,2,3,1]>(r)
        y = Reshape(o, flat)
        size = Shape<start=2, end=3>(both)
        all = Shape(r)"""
    head = (
        f"g ({kind}[B,4,H,W] x, {kind}[B,8] t) => "
        f"({kind}[B,S,8] y, {kind}[B,16,P,Q] both, int64[1] size, int64[4] all)"
    )
    model = model_of(f"{head} {{ {body} }}", weights)
    shapes: dict[str, list[int | str]] = {
        **{name: ["B", 8, "H", "W"] for name in "csnzadfrm"},
        "e": ["B", 8, 1, 1],
        "up": ["B", 8, "2*H", "2*W"],
        "p": ["B", 8, "P", "Q"],
    }
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
                value.type = ir.TensorType(ir.DataType.from_numpy(weights["w1"].dtype))
    return model


def feeds(kind: str, size: tuple[int, int, int]) -> Arrays:
    batch, height, width = size
    return arrays(kind, x=(batch, 4, height, width), t=(batch, 8))


@KINDS
@SIZES
def test_a_resnet_block_becomes_channels_last(kind: str, size: tuple[int, int, int]) -> None:
    model, inputs = resnet(kind), feeds(kind, size)
    wanted = run(resnet(kind), inputs)
    ctx = apply(LowerChannelsLast(), model)
    assert ctx.rewrites == {"conv": 3, "group_norm": 1}
    counts = ops(model)
    assert counts["com.microsoft::NhwcConv"] == 3
    assert counts["com.microsoft::GroupNorm"] == 1
    assert not {"Conv", "GroupNormalization", "Sigmoid"} & set(counts)
    assert standard(model) == 4
    for found, one in zip(run(model, inputs), wanted, strict=True):
        assert found.shape == one.shape
        assert relative_l2(found, one) <= TOLERANCE[kind]


def test_transposes_stay_only_at_the_edges() -> None:
    model = resnet()
    apply(LowerChannelsLast(), model)
    transposes = [node for node in model.graph if node.op_type == "Transpose"]
    ends = [
        value.name
        for node in transposes
        for value in (*node.inputs, *node.outputs)
        if value is not None and (value.is_graph_input() or value.is_graph_output())
    ]
    assert sorted(ends) == ["both", "x"]
    assert len(transposes) == 2


def test_a_group_norm_that_others_read_keeps_its_silu_outside() -> None:
    model = model_of(
        """g (float[B,8,H,W] x) => (float[B,8,H,W] n, float[B,8,H,W] y) {
            n = GroupNormalization<num_groups=4>(x, s, b)
            z = Sigmoid(n)
            y = Mul(n, z)
        }""",
        arrays("float", s=(8,), b=(8,)),
    )
    apply(LowerChannelsLast(), model)
    (norm,) = [node for node in model.graph if node.op_type == "GroupNorm"]
    assert graph.attribute(norm, "activation") == 0
    assert ops(model)["Sigmoid"] == 1


def test_scale_and_bias_are_float32_and_a_kernel_is_never_read() -> None:
    model = resnet("float16")
    for value in model.graph.initializers.values():
        if value.name in ("w1", "w2", "w3"):
            value.const_value = unreadable(value.const_value)
    LowerChannelsLast().apply(model, PassContext(model))
    (norm,) = [node for node in model.graph if node.op_type == "GroupNorm"]
    assert [value.dtype for value in norm.inputs[1:] if value] == [ir.DataType.FLOAT] * 2


def unreadable(like: ir.TensorProtocol | None) -> ir.TensorProtocol:
    assert like is not None

    def read() -> ir.TensorProtocol:
        raise AssertionError("the kernel was read")

    return ir.LazyTensor(read, dtype=like.dtype, shape=ir.Shape(like.shape.numpy()), name="w")


LEFT = {
    "a kernel that is computed": (
        "(float[2,4,6,6] x, float[8,4,3,3] w) => (float[2,8,4,4] y) { y = Conv(x, w) }",
        "computed, not a weight",
    ),
    "a 1-D convolution": (
        "(float[2,4,6] x) => (float[2,8,4] y) { y = Conv(x, w) }",
        "not a 2-D convolution",
    ),
    "a norm of tokens": (
        "(float[2,8,6] x, float[8] s, float[8] b) => (float[2,8,6] y) "
        "{ y = GroupNormalization<num_groups=2>(x, s, b) }",
        "not known to be 4-D",
    ),
    "a norm whose scale is an input": (
        "(float[2,8,6,6] x, float[8] s, float[8] b) => (float[2,8,6,6] y) "
        "{ y = GroupNormalization<num_groups=2>(x, s, b) }",
        "computed, not a weight",
    ),
    "no image at all": ("(float[2,8] x) => (float[2,8] y) { y = Relu(x) }", ""),
}


@pytest.mark.parametrize("case", sorted(LEFT))
def test_what_is_left_alone(case: str) -> None:
    body, reason = LEFT[case]
    weights = {"w": np.ones((8, 4, 3), np.float32)} if "1-D" in case else {}
    leaves(LowerChannelsLast(), model_of(f"g {body}", weights), reason)


def test_linear_resize_goes_back_to_channels_first() -> None:
    model = model_of(
        """g (float[B,4,H,W] x) => (float[B,8,P,Q] y) {
            c = Conv(x, w)
            y = Resize<mode="linear">(c, , zoom)
        }""",
        arrays("float", w=(8, 4, 1, 1)) | {"zoom": np.array([1, 1, 2, 2], np.float32)},
    )
    apply(LowerChannelsLast(), model)
    assert ops(model)["Transpose"] == 2
    inputs = arrays("float", x=(2, 4, 5, 3))
    assert standard(model) == 1
    assert run(model, inputs)[0].shape == (2, 8, 10, 6)
