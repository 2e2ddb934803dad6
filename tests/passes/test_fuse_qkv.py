from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.passes.fuse_qkv import FuseQkv
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

HEADS, DIM, CONTEXT = 2, 8, 6


def attention(k: str = "x", v: str = "x", bias: str = "", transposed: bool = True) -> str:
    """One attention of [B, S, DIM] with the projections' inputs and biases to choose."""
    lines = []
    for one, source in (("q", "x"), ("k", k), ("v", v)):
        weight = f"w{one}"
        if transposed:
            lines.append(f"t{one} = Transpose<perm=[1,0]>({weight})")
            weight = f"t{one}"
        lines.append(f"m{one} = MatMul({source}, {weight})")
        lines.append(
            f"p{one} = Add(m{one}, b{one})" if one in bias else f"p{one} = Identity(m{one})"
        )
        lines.append(f"r{one} = Reshape(p{one}, heads)")
        lines.append(f"h{one} = Transpose<perm=[0,2,1,3]>(r{one})")
    lines.append("a = Attention(hq, hk, hv)")
    lines.append("y = Transpose<perm=[0,2,1,3]>(a)")
    inputs = "float[B,S,8] x" + (", float[B,T,6] c" if "c" in (k, v) else "")
    return f"g ({inputs}) => (float[B,S,2,4] y) {{\n" + "\n".join(lines) + "\n}"


def weights(
    dtype: type = np.float32, bias: str = "", kv: int = DIM, transposed: bool = True
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {"heads": np.array([0, 0, HEADS, DIM // HEADS])}
    for one in "qkv":
        shape = (DIM, DIM if one == "q" else kv)
        made[f"w{one}"] = rng.standard_normal(shape if transposed else shape[::-1]).astype(dtype)
    for one in bias:
        made[f"b{one}"] = rng.standard_normal(DIM).astype(dtype)
    return made


def feeds(context: bool = False, batch: int = 2, length: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {"x": rng.standard_normal((batch, length, DIM), np.float32)}
    if context:
        made["c"] = rng.standard_normal((batch, 3, CONTEXT), np.float32)
    return made


@pytest.mark.parametrize("bias", ["", "qkv", "v", "qk"])
@pytest.mark.parametrize("transposed", [True, False])
def test_self_attention_gets_one_projection(bias: str, transposed: bool) -> None:
    model = model_of(
        attention(bias=bias, transposed=transposed), weights(bias=bias, transposed=transposed)
    )
    before = {batch: run(model, feeds(batch=batch, length=batch + 3))[0] for batch in (1, 3)}
    ctx = apply(FuseQkv(), model)
    counts = ops(model)
    assert ctx.rewrites == {"self_attention_qkv": 1}
    assert counts["MatMul"] == 1
    assert counts["Split"] == 1
    assert counts.get("Add", 0) == (1 if bias else 0)
    for batch, wanted in before.items():
        found = run(model, feeds(batch=batch, length=batch + 3))[0]
        assert relative_l2(found, wanted) < 1e-6


def test_cross_attention_gets_one_k_v_projection() -> None:
    model = model_of(attention(k="c", v="c"), weights(kv=CONTEXT))
    wanted = run(model, feeds(context=True))[0]
    ctx = apply(FuseQkv(), model)
    assert ctx.rewrites == {"cross_attention_kv": 1}
    assert ops(model)["MatMul"] == 2
    assert relative_l2(run(model, feeds(context=True))[0], wanted) < 1e-6


def test_the_fused_weight_is_the_three_one_after_another_and_lazy() -> None:
    values = weights()
    model = model_of(attention(), values)
    apply(FuseQkv(), model)
    fused = next(
        v for n, v in model.graph.initializers.items() if "qkv" in n or n.endswith("weight")
    )
    tensor = fused.const_value
    assert isinstance(tensor, ir.LazyTensor)
    wanted = np.concatenate([values["wq"], values["wk"], values["wv"]])
    np.testing.assert_array_equal(tensor.numpy(), wanted)
    assert not {"wq", "wk", "wv"} & set(model.graph.initializers)


def test_swapping_two_projections_would_be_seen() -> None:
    values = weights()
    wanted = run(model_of(attention(), values), feeds())[0]
    swapped = values | {"wq": values["wk"], "wk": values["wq"] * 0.5}
    assert relative_l2(run(model_of(attention(), swapped), feeds())[0], wanted) > 1e-2


def test_a_second_run_finds_nothing() -> None:
    model = model_of(attention(), weights())
    apply(FuseQkv(), model)
    leaves(FuseQkv(), model)


def test_names_follow_the_checkpoint() -> None:
    from sdopt.passes._fused_linear import _fused_name

    names = [f"down.0.attn1.to_{one}.weight" for one in "qkv"]
    assert _fused_name(names, "qkv") == "down.0.attn1.to_qkv"
    assert _fused_name([f"layers.3.attn.{o}_proj.weight" for o in "qkv"], "qkv") == (
        "layers.3.attn.qkv_proj"
    )


def test_k_and_v_of_different_inputs_are_left() -> None:
    leaves(FuseQkv(), model_of(attention(k="c"), weights_mixed()), "reads another input than")


def weights_mixed() -> dict[str, np.ndarray]:
    made = weights()
    made["wk"] = np.ones((DIM, CONTEXT), np.float32)
    return made


def test_a_projection_that_a_caller_may_override_is_left() -> None:
    model = model_of(attention().replace("x)", "x, float[8,8] wk)", 1), weights())
    assert model.graph.inputs[1].name == "wk"
    leaves(FuseQkv(), model, "k come from no linear projection of a weight")


def test_weights_of_different_types_are_left() -> None:
    text = attention().replace(
        "mk = MatMul(x, tk)", "xk = Cast<to=10>(x)\nmm = MatMul(xk, tk)\nmk = Cast<to=1>(mm)"
    )
    values = weights()
    values["wk"] = values["wk"].astype(np.float16)
    model = model_of(text, values)
    leaves(FuseQkv(), model, "reads another input than")


def test_a_model_without_attention_is_left() -> None:
    leaves(FuseQkv(), model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }"))


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 4), dim=st.integers(1, 5), width=st.integers(1, 9), half=st.booleans())
def test_any_width_and_type(heads: int, dim: int, width: int, half: bool) -> None:
    inner, dtype = heads * dim, np.float16 if half else np.float32
    kind = "float16" if half else "float"
    rng = np.random.default_rng(heads * 100 + dim * 10 + width)
    text = (
        attention()
        .replace("float[B,S,8]", f"{kind}[B,S,{width}]")
        .replace("float[B,S,2,4]", f"{kind}[B,S,{heads},{dim}]")
    )
    values = {f"w{o}": rng.standard_normal((inner, width)).astype(dtype) for o in "qkv"}
    model = model_of(text, values | {"heads": np.array([0, 0, heads, dim])})
    x = {"x": rng.standard_normal((2, 4, width)).astype(dtype)}
    wanted = run(model, x)[0]
    apply(FuseQkv(), model)
    assert relative_l2(run(model, x)[0], wanted) < (5e-3 if half else 1e-6)


def joint(norm: bool = True, k_of_c: str = "c", parts: str = "qkv") -> str:
    """One attention over x and c together, as Stable Diffusion 3 has it; q and k normalized."""
    lines = []
    for one in "qkv":
        for stream, source in (("x", "x"), ("c", k_of_c if one == "k" else "c")):
            end = f"{stream}{one}"
            lines += [
                f"t{end} = Transpose<perm=[1,0]>(w{end})",
                f"m{end} = MatMul({source}, t{end})",
                f"r{end} = Reshape(m{end}, heads)",
                f"s{end} = Transpose<perm=[0,2,1,3]>(r{end})",
            ]
            if norm and one != "v":
                lines.append(f"h{end} = RMSNormalization<axis=-1, epsilon=1e-6>(s{end}, g{one})")
            else:
                lines.append(f"h{end} = Identity(s{end})")
        both = f"hx{one}, hc{one}" if one in parts else f"hx{one}"
        lines.append(f"j{one} = Concat<axis=2>({both})")
    lines += ["a = Attention(jq, jk, jv)", "y = Transpose<perm=[0,2,1,3]>(a)"]
    inputs = "float[B,S,8] x, float[B,T,8] c"
    return f"g ({inputs}) => (float[B,U,2,4] y) {{\n" + "\n".join(lines) + "\n}"


def joint_weights(norm: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    made: dict[str, np.ndarray] = {"heads": np.array([0, 0, HEADS, DIM // HEADS])}
    for end in [f"{stream}{one}" for stream in "xc" for one in "qkv"]:
        made[f"w{end}"] = rng.standard_normal((DIM, DIM), np.float32)
    for one in "qk" if norm else "":
        made[f"g{one}"] = rng.standard_normal(DIM // HEADS, np.float32)
    return made


def joint_feeds(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    shapes = {"x": (batch, 4 + batch, DIM), "c": (batch, 3, DIM)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("norm", [True, False])
def test_a_joint_attention_gets_a_projection_for_each_stream(norm: bool) -> None:
    model = model_of(joint(norm), joint_weights(norm))
    before = {batch: run(model, joint_feeds(batch))[0] for batch in (1, 3)}
    ctx = apply(FuseQkv(), model)
    assert ctx.rewrites == {"joint_attention_qkv": 1}
    assert (ops(model)["MatMul"], ops(model)["Split"]) == (2, 2)
    for batch, wanted in before.items():
        assert relative_l2(run(model, joint_feeds(batch))[0], wanted) < 1e-6
    leaves(FuseQkv(), model)


def test_a_stream_of_two_inputs_is_left_and_the_other_fused() -> None:
    model = model_of(joint(k_of_c="x"), joint_weights())
    ctx = apply(FuseQkv(), model)
    assert "joint_attention_qkv" not in ctx.rewrites
    (skip,) = ctx.skips
    assert (skip.kind, "reads another input" in skip.reason) == ("joint_attention_qkv", True)
    assert ops(model)["Split"] == 1


def test_operands_of_different_parts_are_left() -> None:
    model = model_of(joint(parts="kv"), joint_weights())
    ctx = apply(FuseQkv(), model)
    assert [one.kind for one in ctx.skips] == ["other_projections"]
    assert "different numbers of parts" in ctx.skips[0].reason
    assert "Split" not in ops(model)
