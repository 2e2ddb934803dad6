from __future__ import annotations

import numpy as np
import pytest

from sdopt.passes.base import PassContext
from sdopt.passes.lower_group_norm import LowerGroupNorm
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

RNG = np.random.default_rng(0)
WEIGHTS = {"scale": RNG.standard_normal(8, np.float32), "bias": RNG.standard_normal(8, np.float32)}

IMAGE = """g (float[B,8,H,W] x) => (float[B,8,H,W] y) {
    y = GroupNormalization<num_groups=4, epsilon=0.01>(x, scale, bias)
}"""
SEQUENCE = """g (float[B,8,S] x) => (float[B,8,S] y) {
    y = GroupNormalization<num_groups=2>(x, scale, bias)
}"""


def by_definition(x: np.ndarray, groups: int, epsilon: float) -> np.ndarray:
    """Group normalisation in float64."""
    wide = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    gap = wide - wide.mean(-1, keepdims=True)
    normal = (gap / np.sqrt((gap**2).mean(-1, keepdims=True) + epsilon)).reshape(x.shape)
    per_channel = (-1, *[1] * (x.ndim - 2))
    return normal * WEIGHTS["scale"].reshape(per_channel) + WEIGHTS["bias"].reshape(per_channel)


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 8, 16, 3), (2, 8, 11), (3, 8, 4)])
def test_it_computes_the_same(shape: tuple[int, ...]) -> None:
    body, groups, epsilon = (IMAGE, 4, 0.01) if len(shape) == 4 else (SEQUENCE, 2, 1e-5)
    model = model_of(body, WEIGHTS)
    # Off zero, where a variance from E[x^2] - E[x]^2 would lose digits.
    x = RNG.standard_normal(shape, np.float32) * 2 + 10
    (before,) = run(model, {"x": x})
    apply(LowerGroupNorm(), model)
    (after,) = run(model, {"x": x})
    assert relative_l2(after, before) < 5e-6
    assert relative_l2(after, by_definition(x, groups, epsilon)) < 5e-6
    assert after.dtype == np.float32


def test_what_it_writes() -> None:
    model = model_of(IMAGE, WEIGHTS)
    ctx = apply(LowerGroupNorm(), model)
    assert ctx.rewrites == {"group_norm": 1}
    assert ops(model) == {
        "Reshape": 2,
        "BatchNormalization": 1,
        "InstanceNormalization": 1,
        "Shape": 1,
    }
    norm = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    assert norm.attributes["epsilon"].value == pytest.approx(0.01)
    affine = next(node for node in model.graph if node.op_type == "BatchNormalization")
    assert affine.attributes["epsilon"].value == 0.0
    assert [value.name for value in affine.inputs[1:3] if value] == ["scale", "bias"]
    assert model.graph.outputs[0].name == "y"


def test_scale_and_bias_stay_the_same_tensors() -> None:
    model = model_of(IMAGE, WEIGHTS)
    kept = {name: model.graph.initializers[name].const_value for name in WEIGHTS}
    apply(LowerGroupNorm(), model)
    assert {name: model.graph.initializers[name].const_value for name in WEIGHTS} == kept


def test_norms_of_one_width_share_their_statistics() -> None:
    body = """g (float[B,8,H,W] x) => (float[B,8,H,W] y) {
        a = GroupNormalization<num_groups=4>(x, scale, bias)
        y = GroupNormalization<num_groups=2>(a, scale, bias)
    }"""
    model = model_of(body, WEIGHTS)
    apply(LowerGroupNorm(), model)
    first, second = (node for node in model.graph if node.op_type == "BatchNormalization")
    assert first.inputs[3] is second.inputs[3]
    assert first.inputs[4] is second.inputs[4]


def test_half_precision_is_normalised_in_float32() -> None:
    body = """g (float16[B,8,H,W] x) => (float16[B,8,H,W] y) {
        y = GroupNormalization<num_groups=4>(x, scale, bias)
    }"""
    halves = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    model = model_of(body, halves)
    x = (RNG.standard_normal((2, 8, 6, 9)) * 200 + 500).astype(np.float16)
    apply(LowerGroupNorm(), model)
    (after,) = run(model, {"x": x})
    assert after.dtype == np.float16
    wanted = by_definition(x, 4, 1e-5)
    assert (
        relative_l2(after, wanted) < 5e-4
    )  # one rounding to float16, and those of scale and bias


def test_a_second_time_changes_nothing() -> None:
    model = model_of(IMAGE, WEIGHTS)
    apply(LowerGroupNorm(), model)
    leaves(LowerGroupNorm(), model)


def test_leaves_alone_scales_per_group() -> None:
    model = model_of(IMAGE, {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)})
    model.opset_imports[""] = 20
    ctx = PassContext(model)
    LowerGroupNorm().apply(model, ctx)
    assert ops(model) == {"GroupNormalization": 1}
    assert "opset 20 scales each group" in ctx.skips[0].reason


def test_leaves_alone_a_computed_scale() -> None:
    body = """g (float[B,8,H,W] x, float[8] s) => (float[B,8,H,W] y) {
        y = GroupNormalization<num_groups=4>(x, s, bias)
    }"""
    leaves(LowerGroupNorm(), model_of(body, {"bias": WEIGHTS["bias"]}), "its scale is computed")


def test_leaves_alone_the_same_word_of_another_domain() -> None:
    model = model_of(IMAGE, WEIGHTS)
    node = next(iter(model.graph))
    node.domain = "their.domain"
    model.opset_imports["their.domain"] = 1
    ctx = PassContext(model)
    LowerGroupNorm().apply(model, ctx)
    assert not ctx.rewrites
    assert not ctx.skips
