from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdopt.passes.cast_fp16 import CastFp16
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT

BLOCK = """g (float[B,4] sample, float timestep) => (float[B,4] out) {
    phase = Mul(timestep, freq)
    wave = Sin(phase)
    a = MatMul(sample, w)
    b = Add(a, wave)
    n = LayerNormalization(b, gamma, beta)
    out = Relu(n)
}"""


def block_weights(scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "freq": np.array([1.0, 0.1, 0.01, 0.001], np.float32),
        "w": (rng.standard_normal((4, 4)) * scale).astype(np.float32),
        "gamma": np.ones(4, np.float32),
        "beta": np.zeros(4, np.float32),
    }


def block_feeds(dtype: type = np.float32, timestep: float = 999.0) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(1).standard_normal((2, 4)).astype(dtype)
    return {"sample": sample, "timestep": np.array(timestep, np.float32)}


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {v.name or "": v.dtype for v in [*model.graph.inputs, *model.graph.outputs]}


def test_weights_inputs_and_outputs_become_half() -> None:
    model = model_of(BLOCK, block_weights())
    wanted = run(model, block_feeds())[0]
    apply(CastFp16(), model)
    assert types(model) == {"sample": HALF, "timestep": FLOAT, "out": HALF}
    weight = next(v for n, v in model.graph.initializers.items() if n.startswith("w."))
    assert weight.const_value is not None
    assert weight.const_value.dtype == HALF
    assert relative_l2(run(model, block_feeds(np.float16))[0], wanted) < 2e-3


def test_the_phase_of_the_timestep_stays_in_float32() -> None:
    """At t = 999 a half float is 0.25 off, which is another point of the sine altogether."""
    model = model_of(BLOCK, block_weights())
    apply(CastFp16(), model)
    for node in model.graph:
        if node.op_type in ("Sin", "Mul"):
            assert node.outputs[0].dtype == FLOAT
    naive = np.sin(np.float16(999.0) * np.float16(0.1), dtype=np.float32)
    assert abs(naive - np.sin(np.float32(99.9))) > 1e-2  # what the rule protects from


def test_keep_io_keeps_the_signature() -> None:
    model = model_of(BLOCK, block_weights())
    before = types(model)
    assert not CastFp16(("io",)).changes_interface()
    apply(CastFp16(("io",)), model)
    assert types(model) == before
    assert model.graph.outputs[0].name == "out"
    assert run(model, block_feeds())[0].dtype == np.float32


def test_keep_by_operator_and_by_module_path() -> None:
    model = model_of(BLOCK, block_weights())
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["sdopt.module"] = "down_blocks.0.attn.to_q"
    apply(CastFp16(("LayerNormalization", "down_blocks.*.attn")), model)
    kept = {n.op_type for n in model.graph if n.outputs[0].dtype == FLOAT and n.op_type != "Cast"}
    assert {"LayerNormalization", "MatMul"} <= kept
    assert "Relu" not in kept


def test_a_keep_that_names_nothing_is_reported() -> None:
    ctx = apply(CastFp16(("LayerNorm",)), model_of(BLOCK, block_weights()))
    assert "keep=LayerNorm names no operator" in ctx.skips[0].reason


def test_a_weight_beyond_65504_is_named_and_stays() -> None:
    model = model_of(BLOCK, block_weights(scale=1e5))
    for node in model.graph:
        node.metadata_props["sdopt.module"] = f"blocks.7.{node.op_type}"
    wanted = run(model, block_feeds())[0]
    ctx = apply(CastFp16(("io",)), model)
    assert [s.where for s in ctx.skips] == ["blocks.7.MatMul"]
    assert "w holds values beyond 65504" in ctx.skips[0].reason
    assert "w" in model.graph.initializers
    # What the layer hands on is beyond 65504 too, so this graph is honest about its limits:
    # the weight is exact, and the report says where to keep more.
    assert np.isfinite(wanted).all()


def test_infinite_masks_become_finite() -> None:
    text = """g (float[2,3] x) => (float[2,3] y) { m = Add(x, mask)\n y = Softmax(m) }"""
    mask = np.array([[0, -np.inf, -np.inf], [-np.inf] * 3], np.float32)
    model = model_of(text, {"mask": mask})
    ctx = apply(CastFp16(), model)
    assert ctx.rewrites["mask made finite"] == 1
    out = run(model, {"x": np.zeros((2, 3), np.float16)})[0]
    assert not np.isnan(out).any()  # a row of nothing but -inf would be NaN


def test_scales_of_resize_stay_float32() -> None:
    model = model_of(
        """g (float[1,2,4,4] x) => (float[1,2,8,8] y) {
        y = Resize<mode="nearest">(x, , scales) }""",
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    )
    apply(CastFp16(), model)
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float16)
    np.testing.assert_array_equal(run(model, {"x": x})[0], x.repeat(2, 2).repeat(2, 3))


def test_a_cast_to_float_becomes_a_cast_to_half() -> None:
    model = model_of(
        "g (int64[3] i, float[3] x) => (float[3] y) { f = Cast<to=1>(i)\n y = Mul(f, x) }"
    )
    apply(CastFp16(), model)
    assert ops(model) == {"Cast": 1, "Mul": 1}
    out = run(model, {"i": np.array([1, 2, 3]), "x": np.ones(3, np.float16)})[0]
    assert out.dtype == np.float16


def test_a_graph_that_is_half_already_is_left() -> None:
    text = "g (float16[2,3] x) => (float16[2,3] y) { y = MatMul(x, w) }"
    leaves(
        CastFp16(), model_of(text, {"w": np.ones((3, 3), np.float16)}), "in a half type already"
    )


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
    apply(CastFp16(), model)
    x = np.array([[-1, 2], [3, -4]], np.float16)
    np.testing.assert_array_equal(run(model, {"c": np.array(True), "x": x})[0], np.maximum(x, 0))


def test_integers_and_shapes_are_none_of_its_business() -> None:
    leaves(CastFp16(), model_of("g (int64[3] x) => (int64[3] y) { y = Add(x, x) }"))
