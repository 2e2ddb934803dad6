"""What ``cast_bf16`` has of its own; the rest is in ``test_casts.py``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from ml_dtypes import bfloat16

from sdopt.passes.base import PassContext
from sdopt.passes.cast_bf16 import CastBf16
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.pipeline import Pipeline
from tests.passes.cast_blocks import BLOCK, block_feeds, block_weights, evaluate, types
from tests.toolkit import apply, leaves, model_of, relative_l2, run

HALF, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


@pytest.mark.parametrize("batch", [2, 7])
def test_weights_inputs_and_outputs_become_bfloat16(batch: int) -> None:
    model = model_of(BLOCK, block_weights())
    wanted = run(model, block_feeds(batch))[0]
    ctx = apply(CastBf16(), model)
    assert types(model) == {"sample": HALF, "timestep": FLOAT, "out": HALF}
    assert ctx.rewrites["weight cast"] == 3
    weight = model.graph.initializers["w.bfloat16"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), block_weights()["w"].astype(bfloat16))
    assert relative_l2(evaluate(model, block_feeds(batch)), wanted) < 1.6e-2  # 8 x fp16's 2e-3


def test_a_matmul_is_the_one_of_ml_dtypes() -> None:
    x, w = block_feeds()["sample"], block_weights()["w"]
    model = model_of("g (float[2,4] x) => (float[2,4] y) { y = MatMul(x, w) }", {"w": w})
    apply(CastBf16(), model)
    found = evaluate(model, {"x": x})
    wanted = x.astype(bfloat16).astype(np.float32) @ w.astype(bfloat16).astype(np.float32)
    assert relative_l2(found, wanted) < 2**-7  # the sum's own roundings


def test_a_convolution_of_opset_22_and_one_before_it() -> None:
    text = """g (float[1,2,5,5] x) => (float[1,3,5,5] y) {
        c = Conv<pads=[1,1,1,1]>(x, w)
        y = Relu(c)
    }"""
    rng = np.random.default_rng(2)
    w, x = (rng.standard_normal(s).astype(np.float32) for s in ((3, 2, 3, 3), (1, 2, 5, 5)))
    wanted = run(model_of(text, {"w": w}), {"x": x})[0]
    for opset, kept in ((22, False), (18, True)):
        model = model_of(text, {"w": w}, opset)
        ctx = apply(CastBf16(), model)
        assert ("w" in model.graph.initializers) is kept
        reasons = [skip.reason for skip in ctx.skips]
        assert reasons == (["Conv has no bf16 form in opset 18"] if kept else [])
        assert relative_l2(evaluate(model, {"x": x}), wanted) < 1e-2


def test_weights_beyond_65504_are_nothing_special_and_not_even_read() -> None:
    text = "g (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }"
    rng = np.random.default_rng(3)
    w, x = ((rng.standard_normal((n, 64)) * 1e5).astype(np.float32) for n in (64, 2))
    model = model_of(text, {"w": w})
    reads: list[str] = []

    def read() -> ir.TensorProtocol:
        reads.append("w")
        return ir.tensor(w, name="w")

    lazy = ir.LazyTensor(read, dtype=FLOAT, shape=ir.Shape(w.shape), name="w")
    model.graph.initializers["w"].const_value = lazy
    ctx = PassContext(model)
    CastBf16().apply(model, ctx)
    assert not reads
    assert not ctx.skips
    assert list(model.graph.initializers) == ["w.bfloat16"]
    assert relative_l2(evaluate(model, {"x": x}), x @ w) < 1e-2
    narrow = apply(CastFp16(), model_of(text, {"w": w}))
    assert "beyond 65504" in narrow.skips[0].reason


def test_one_cast_after_the_other_is_left() -> None:
    model = model_of(BLOCK, block_weights())
    apply(CastFp16(), model)
    leaves(CastBf16(), model, "in a half type already")
    assert str(Pipeline.parse("cast_bf16:keep=io+MatMul")) == "cast_bf16:keep=io+MatMul"
