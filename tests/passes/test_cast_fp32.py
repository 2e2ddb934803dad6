"""cast_fp32: half graphs in float32, with the numbers of their weights and no others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.passes.cast_fp32 import CastFp32
from sdopt.pipeline import Pipeline, RunContext
from tests.passes.denoiser import denoiser, feeds
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

F16 = np.float16


def test_a_half_denoiser_computes_in_float32() -> None:
    half = denoiser(F16)
    wanted = run(denoiser(F16), feeds(F16))
    ctx = apply(CastFp32(), half)
    assert {value.dtype for value in graph_values(half)} <= {
        None,
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    }
    assert ctx.rewrites["weight widened"] == 12
    found = run(half, feeds(np.float32))
    assert found[0].dtype == np.float32
    assert 0 < relative_l2(found[0], wanted[0].astype(np.float32)) < 5e-3


@pytest.mark.parametrize(("batch", "size"), [(1, (4, 4)), (2, (6, 10))])
def test_what_was_cast_to_half_is_nearer_to_the_model_than_the_half(
    batch: int, size: tuple[int, int]
) -> None:
    given = feeds(np.float32, batch, size)
    wanted = run(denoiser(), given)[0]
    there = denoiser()
    apply(CastFp16(keep=("io",)), there)
    half = run(there, given)[0]
    apply(CastFp32(), there)
    Pipeline.parse("clean").run(there, RunContext())
    assert "Cast" not in ops(there)
    back = run(there, given)[0]
    assert relative_l2(back, wanted) < relative_l2(half, wanted) < 5e-3


def test_constants_and_types_in_attributes_follow() -> None:
    model = model_of(
        """g (float16[N] x) => (float16[N] y) {
            two = Constant<value = float[1] {2.0}>()
            shape = Shape(x)
            ones = ConstantOfShape<value = float[1] {1.0}>(shape)
            wide = Cast<to=1>(x)
            narrow = Cast<to=10>(wide)
            a = Mul(narrow, two)
            y = Add(a, ones)
        }"""
    )
    for node in model.graph:
        if "value" in node.attributes:  # the text format has no numbers in half precision
            number = node.attributes["value"].as_tensor().numpy().astype(F16)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(number))
    x = np.array([0.1, 2.0], F16)
    wanted = run(model_of_same(), {"x": x})[0]
    apply(CastFp32(), model)
    found = run(model, {"x": x.astype(np.float32)})[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.astype(np.float32), rtol=1e-3)


def model_of_same() -> ir.Model:
    return model_of(
        "g (float16[N] x) => (float16[N] y) { d = Add(x, x) y = Add(d, one) }",
        {"one": np.ones(1, F16)},
    )


def test_bodies_of_control_flow_follow() -> None:
    model = model_of(
        """g (float16[N] x, bool c) => (float16[N] y) {
            y = If(c) <then_branch = t () => (float16[N] p) { p = Add(x, w) },
                       else_branch = e () => (float16[N] q) { q = Mul(x, w) }>
        }""",
        {"w": np.array([3.0], F16)},
    )
    apply(CastFp32(), model)
    x = np.array([1.0, 2.0], np.float32)
    for condition, wanted in ((True, x + 3), (False, x * 3)):
        (found,) = run(model, {"x": x, "c": np.array(condition)})
        np.testing.assert_array_equal(found, wanted)


def test_a_float32_graph_is_left_as_it_is() -> None:
    leaves(CastFp32(), denoiser())


def graph_values(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for node in graph.nodes(model)
        for value in (*node.inputs, *node.outputs)
        if value is not None
    ]
