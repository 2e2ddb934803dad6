"""Operations counted by hand, from shapes that are only known once sizes are stated."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import flops
from tests.passes.denoiser import denoiser
from tests.toolkit import model_of


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("text", "weights", "wanted"),
    [
        ("(float[B,5,3] x) => (y) { y = MatMul(x, w) }", {"w": zeros(3, 7)}, 2 * 4 * 5 * 3 * 7),
        (
            "(float[B,3] x) => (y) { y = Gemm<transB=1>(x, w, b) }",
            {"w": zeros(7, 3), "b": zeros(7)},
            2 * 4 * 3 * 7,
        ),
        (
            "(float[3,B] x) => (y) { y = Gemm<transA=1>(x, w) }",
            {"w": zeros(3, 7)},
            2 * 4 * 3 * 7,
        ),
        (
            "(float[B,8,H,10] x) => (y) { y = Conv<group=2, strides=[2,2]>(x, w) }",
            {"w": zeros(6, 4, 3, 3)},
            2 * 4 * 6 * 2 * 4 * (4 * 9),
        ),
        (
            "(float[B,8,H,10] x) => (y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
            {"w": zeros(8, 5, 2, 2)},
            2 * 4 * 8 * 6 * 10 * 5 * 4,
        ),
        (
            "(float[B,2,H,8] q, float[B,2,9,8] k, float[B,2,9,4] v) => (y) "
            "{ y = Attention(q, k, v) }",
            {},
            4 * 2 * 6 * 9 * 2 * (8 + 4),
        ),
        (
            "(float[B,H,16] q, float[B,9,16] k, float[B,9,8] v) => (y) "
            "{ y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) }",
            {},
            4 * 2 * 6 * 9 * 2 * (8 + 4),
        ),
    ],
)
def test_by_hand(text: str, weights: dict[str, np.ndarray], wanted: int) -> None:
    model = model_of(f"g {text.replace('(y)', '(float[N] y)')}", weights)
    found = flops.count(model, {"B": 4, "H": 6})
    assert found.total == wanted
    assert not found.unknown


def test_onnxruntimes_attention_costs_what_the_standard_one_does() -> None:
    text = """g (float[B,6,16] q, float[B,9,16] k, float[B,9,8] v) => (float[B,6,8] y) {
        y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)
    }"""
    model = model_of(text)
    assert flops.count(model, {"B": 4}).total == 4 * 2 * 6 * 9 * 2 * (8 + 4)


def test_sizes_that_the_graph_computes() -> None:
    """Reshape, Resize and Expand by shape arithmetic, and a GroupNormalization on the way."""
    text = """g (float[B,4,H,W] x) => (float[N] y) {
        s = Shape(x)
        h = Gather(s, two)
        double = Mul(h, two)
        sizes = Concat<axis=0>(b, four, double, double)
        up = Resize<mode="nearest">(x, , , sizes)
        n = GroupNormalization<num_groups=2>(up, one, one)
        rows = Reshape(n, shape)
        y = MatMul(rows, w)
    }"""
    weights = {
        "two": np.array([2]), "b": np.array([3]), "four": np.array([4]),
        "one": np.ones(4, np.float32), "shape": np.array([0, 4, -1]), "w": zeros(4 * 5 * 5, 6),
    }  # fmt: skip
    found = flops.count(model_of(text, weights), {"B": 3, "H": 5, "W": 5})
    assert found.total == 2 * 3 * 4 * 100 * 6
    assert not found.unknown


def test_what_cannot_be_told_is_said() -> None:
    text = """g (float[B,4] x) => (float[N] y) {
        i = NonZero(x)
        f = Cast<to=1>(i)
        y = MatMul(f, f)
        z = MatMul(x, w)
    }"""
    found = flops.count(model_of(text, {"w": zeros(4, 5)}), {"B": 2})
    assert found.total == 2 * 2 * 4 * 5
    assert [node.outputs[0].name for node in found.unknown] == ["y"]


def test_no_weight_is_read() -> None:
    class Untouchable(ir.LazyTensor):
        def __init__(self, like: ir.TensorProtocol) -> None:
            def read() -> ir.TensorProtocol:
                raise AssertionError("read")

            super().__init__(read, dtype=like.dtype, shape=ir.Shape(like.shape.numpy()))

    model = denoiser()
    wanted = flops.count(model, {"height": 8, "width": 6}).total
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            value.const_value = Untouchable(value.const_value)
    assert flops.count(model, {"height": 8, "width": 6}).total == wanted > 0


def test_the_size_that_a_denoiser_was_trained_at() -> None:
    assert flops.sizes_of({})["height"] == 64
    assert flops.sizes_of({"sample_size": 96})["width"] == 96
    sizes = flops.sizes_of({"sample_size": [32, 48]})
    assert flops.stated(sizes) == "latent 32x48, batch 2, 77 tokens"
