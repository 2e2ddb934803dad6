"""What holds for both casts alike; what is of one type's own lies in the file of that cast."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from ml_dtypes import bfloat16

from sdopt.passes._casting import HalfCast
from sdopt.passes.cast_bf16 import CastBf16
from sdopt.passes.cast_fp16 import CastFp16
from tests.passes.cast_blocks import BLOCK, block_feeds, block_weights, evaluate, types
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

FLOAT = ir.DataType.FLOAT

pytestmark = pytest.mark.parametrize("cast", [CastFp16, CastBf16])

Cast = type[HalfCast]


def test_the_phase_of_the_timestep_stays_in_float32(cast: Cast) -> None:
    """At t = 999 a half float is 0.25 off, which is another point of the sine altogether."""
    model = model_of(BLOCK, block_weights())
    apply(cast(), model)
    assert {n.outputs[0].dtype for n in model.graph if n.op_type in ("Sin", "Mul")} == {FLOAT}
    half = cast.half.numpy().type
    naive = np.sin(np.float32(half(999.0) * half(0.1)))
    assert abs(naive - np.sin(np.float32(99.9))) > 1e-2  # what the rule protects from


BUCKETS = """
g (int64[N] i, float[N,4] x) => (float[N,4] y) {
    f = Cast<to=1>(i)
    l = Log(f)
    s = Mul(l, scale)
    b = Cast<to=7>(s)
    rows = Gather(table, b)
    y = Add(rows, x)
}
"""


def test_integers_made_of_integers_stay_exact(cast: Cast) -> None:
    """The logarithmic buckets of T5's positions: a half float falls into the next one."""
    table = np.arange(400, dtype=np.float32).reshape(100, 4) % 31
    weights = {"table": table, "scale": np.array(16, np.float32)}
    model = model_of(BUCKETS, weights)
    feeds = {"i": np.arange(1, 200), "x": np.zeros((199, 4), np.float32)}
    wanted = evaluate(model_of(BUCKETS, weights), feeds)
    apply(cast(), model)
    assert {n.outputs[0].dtype for n in model.graph if n.op_type in ("Log", "Mul")} == {FLOAT}
    assert np.array_equal(evaluate(model, feeds), wanted)


def test_data_made_integers_is_no_index_arithmetic(cast: Cast) -> None:
    text = (
        "g (float[2,3] x) => (int64[2,3] y) { m = MatMul(x, w)\n s = Relu(m)\n y = Cast<to=7>(s) }"
    )
    model = model_of(text, {"w": np.eye(3, dtype=np.float32)})
    apply(cast(), model)
    kinds = {n.op_type: n.outputs[0].dtype for n in model.graph}
    assert kinds["MatMul"] == kinds["Relu"] == cast.half


def test_keep_io_operators_and_modules(cast: Cast) -> None:
    model = model_of(BLOCK, block_weights())
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["sdopt.module"] = "down_blocks.0.attn.to_q"
    before, wanted = types(model), evaluate(model, block_feeds())
    one = cast(("io", "LayerNormalization", "down_blocks.*.attn"))
    assert not one.changes_interface()
    apply(one, model)
    assert types(model) == before
    kept = {n.op_type for n in model.graph if n.outputs[0].dtype == FLOAT and n.op_type != "Cast"}
    assert kept == {"Sin", "Mul", "MatMul", "LayerNormalization"}
    assert relative_l2(evaluate(model, block_feeds()), wanted) < (1.6e-2, 2e-3)[cast.narrow]


def test_a_keep_that_names_nothing_is_reported(cast: Cast) -> None:
    ctx = apply(cast(("LayerNorm",)), model_of(BLOCK, block_weights()))
    assert "keep=LayerNorm names no operator" in ctx.skips[0].reason


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min])
def test_masks_stay_finite(cast: Cast, low: float) -> None:
    """The lowest float32, which PyTorch's masks hold, would round to -inf."""
    text = "g (float[2,3] x) => (float[2,3] y) { m = Add(x, mask)\n y = Softmax(m) }"
    mask = np.array([[0, low, low], [low] * 3], np.float32)
    model = model_of(text, {"mask": mask})
    assert apply(cast(), model).rewrites["mask made finite"] == 1
    out = evaluate(model, {"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_allclose(out, [[1, 0, 0], [1 / 3] * 3], atol=2e-3)


def test_a_cast_to_float_becomes_a_cast_to_half(cast: Cast) -> None:
    model = model_of(
        "g (int64[3] i, float[3] x) => (float[3] y) { f = Cast<to=1>(i)\n y = Mul(f, x) }"
    )
    apply(cast(), model)
    assert ops(model) == {"Cast": 1, "Mul": 1}
    feeds = {"i": np.array([1, 2, 3]), "x": np.ones(3, np.float32)}
    np.testing.assert_array_equal(evaluate(model, feeds), [1, 2, 3])


def test_control_flow_stays_in_float32(cast: Cast) -> None:
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
    ctx = apply(cast(), model)
    x = np.array([[-1, 2], [3, -4]], np.float32)
    np.testing.assert_array_equal(evaluate(model, {"c": np.array(True), "x": x}), np.maximum(x, 0))
    assert [skip.reason for skip in ctx.skips] == ["If stays in fp32, with all inside"]


def test_sequences_stay_in_float32(cast: Cast) -> None:
    model = model_of(
        """g (float[4,2] x, seq(float[2,2]) given) => (seq(float[2,2]) parts, float[2,2] y) {
            parts = SplitToSequence<axis=0>(x, size)
            part = SequenceAt(parts, one)
            other = SequenceAt(given, one)
            both = Add(part, other)
            y = MatMul(both, w)
        }""",
        {"size": np.array(2), "one": np.array(1), "w": np.eye(2, dtype=np.float32)},
    )
    before = [str(value.type) for value in (model.graph.inputs[1], model.graph.outputs[0])]
    ctx = apply(cast(("io",)), model)
    after = [str(value.type) for value in (model.graph.inputs[1], model.graph.outputs[0])]
    assert after == before
    assert "SplitToSequence handles sequences and stays in fp32" in {s.reason for s in ctx.skips}
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    assert matmul.outputs[0].dtype == cast.half
    if cast is CastFp16:
        x = np.arange(8, dtype=np.float32).reshape(4, 2)
        parts, y = run(model, {"x": x, "given": [x[:2], x[2:]]})
        np.testing.assert_array_equal(parts, [x[:2], x[2:]])
        np.testing.assert_array_equal(y, 2 * x[2:])


def test_sequences_without_a_stated_type_stay_too(cast: Cast) -> None:
    """As PyTorch's exporter writes a chunk: no type on what is between its nodes."""
    text = """g (float[2,4] x) => (float[2,2] y) {
        a = Mul(x, scale)
        parts = SplitToSequence<axis=1>(a, sizes)
        one = SequenceAt(parts, first)
        other = SequenceAt(parts, second)
        y = Mul(one, other)
    }"""
    weights = {
        "scale": np.full((2, 4), 0.5, np.float32),
        "sizes": np.array([2, 2]),
        "first": np.array(0),
        "second": np.array(1),
    }
    model = model_of(text, weights)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    ctx = apply(cast(keep=("io",)), model)
    assert "SplitToSequence handles sequences and stays in fp32" in {s.reason for s in ctx.skips}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    if cast is CastFp16:  # onnxruntime's CPU has no bfloat16 kernels
        (found,) = run(model, {"x": x})
        np.testing.assert_array_equal(found, x[:, :2] * x[:, 2:] / 4)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_a_graph_that_is_half_already_is_left(cast: Cast, dtype: type) -> None:
    word = "float16" if dtype is np.float16 else "bfloat16"
    text = f"g ({word}[2,3] x) => ({word}[2,3] y) {{ y = MatMul(x, w) }}"
    leaves(cast(), model_of(text, {"w": np.ones((3, 3), dtype)}), "in a half type already")


def test_integers_and_shapes_are_none_of_its_business(cast: Cast) -> None:
    leaves(cast(), model_of("g (int64[3] x) => (int64[3] y) { y = Add(x, x) }"))
