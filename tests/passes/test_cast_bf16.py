"""The numbers here come from onnx's reference evaluator and from ml_dtypes' bfloat16.

ONNX Runtime 1.31 has next to no bfloat16 kernels on the CPU (no MatMul, no Conv), so a graph cast
to bf16 can be checked there only for what it means, not run for speed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from ml_dtypes import bfloat16
from onnx.reference import ReferenceEvaluator

from sdopt.passes.base import PassContext
from sdopt.passes.cast_bf16 import CastBf16
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.pipeline import Pipeline
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run

HALF, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT

BLOCK = """g (float[B,4] sample, float timestep) => (float[B,4] out) {
    phase = Mul(timestep, freq)
    wave = Sin(phase)
    a = MatMul(sample, w)
    b = Add(a, wave)
    n = LayerNormalization(b, gamma, beta)
    out = Relu(n)
}"""


def block_weights(scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "freq": np.array([1.0, 0.1, 0.01, 0.001], np.float32),
        "w": (rng.standard_normal((4, 4)) * scale).astype(np.float32),
        "gamma": np.ones(4, np.float32),
        "beta": np.zeros(4, np.float32),
    }


def block_feeds(batch: int = 2) -> Arrays:
    sample = np.random.default_rng(1).standard_normal((batch, 4)).astype(np.float32)
    return {"sample": sample, "timestep": np.array(999.0, np.float32)}


def evaluate(model: ir.Model, feeds: Arrays) -> np.ndarray:
    """The first output by onnx's reference, its bfloat16 inputs cast, as float32."""
    types = {value.name: value.dtype for value in model.graph.inputs}
    cast = {n: a.astype(bfloat16) if types[n] == HALF else a for n, a in feeds.items()}
    out = np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, cast)[0])
    wanted = model.graph.outputs[0].dtype
    assert wanted is not None
    assert out.dtype == wanted.numpy()
    return out.astype(np.float32)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {v.name or "": v.dtype for v in [*model.graph.inputs, *model.graph.outputs]}


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


def test_keep_io_operators_and_modules() -> None:
    model = model_of(BLOCK, block_weights())
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["sdopt.module"] = "down_blocks.0.attn.to_q"
    before = types(model)
    wanted = run(model, block_feeds())[0]
    one = CastBf16(("io", "LayerNormalization", "down_blocks.*.attn"))
    assert not one.changes_interface()
    apply(one, model)
    assert types(model) == before
    kept = {n.op_type for n in model.graph if n.outputs[0].dtype == FLOAT and n.op_type != "Cast"}
    assert kept == {"Sin", "Mul", "MatMul", "LayerNormalization"}
    assert relative_l2(evaluate(model, block_feeds()), wanted) < 1.6e-2


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


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min])
def test_masks_stay_finite(low: float) -> None:
    """The lowest float32, which PyTorch's masks hold, would round to -inf."""
    text = "g (float[2,3] x) => (float[2,3] y) { m = Add(x, mask)\n y = Softmax(m) }"
    mask = np.array([[0, low, low], [low] * 3], np.float32)
    model = model_of(text, {"mask": mask})
    assert apply(CastBf16(), model).rewrites["mask made finite"] == 1
    out = evaluate(model, {"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_allclose(out, [[1, 0, 0], [1 / 3] * 3], atol=2e-3)


def test_control_flow_stays_in_float32() -> None:
    model = model_of(
        """g (bool c, float[2,2] x) => (float[2,2] y) {
        m = MatMul(x, w)
        y = If (c) <
            then_branch = t () => (float[2,2] a) { a = Relu(m) },
            else_branch = e () => (float[2,2] b) { b = Neg(m) }
        >
    }""",
        {"w": np.eye(2, dtype=np.float32)},
    )
    apply(CastBf16(), model)
    x = np.array([[-1, 2], [3, -4]], np.float32)
    np.testing.assert_array_equal(evaluate(model, {"c": np.array(True), "x": x}), np.maximum(x, 0))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_a_graph_that_is_half_already_is_left(dtype: type) -> None:
    word = "float16" if dtype is np.float16 else "bfloat16"
    text = f"g ({word}[2,3] x) => ({word}[2,3] y) {{ y = MatMul(x, w) }}"
    leaves(CastBf16(), model_of(text, {"w": np.ones((3, 3), dtype)}), "in a half type already")


def test_one_cast_after_the_other_is_left() -> None:
    model = model_of(BLOCK, block_weights())
    apply(CastFp16(), model)
    leaves(CastBf16(), model, "in a half type already")
    assert str(Pipeline.parse("cast_bf16:keep=io+MatMul")) == "cast_bf16:keep=io+MatMul"
