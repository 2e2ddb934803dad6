from __future__ import annotations

import numpy as np
import pytest

from sdopt.passes.lower_attention import LowerAttention
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

CONSTANTS = {"heads": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32])}
V_CONSTANTS = {"v_heads": np.array([0, 0, 4, 6]), "v_flat": np.array([0, 0, 24])}


def block(attention: str = "a = Attention(qh, kh, vh)", v: int = 32, inputs: str = "") -> str:
    """Attention as exporters write it, from ``[B, S, heads * D]`` and back."""
    split, join = ("heads", "flat") if v == 32 else ("v_heads", "v_flat")
    return f"""g (float[B,S,32] q, float[B,T,32] k, float[B,T,{v}] v{inputs})
        => (float[B,S,{v}] y)
        <float[B,4,S,8] qh, float[B,4,T,8] kh, float[B,4,T,{v // 4}] vh>
    {{
        qr = Reshape(q, heads)
        qh = Transpose<perm=[0,2,1,3]>(qr)
        kr = Reshape(k, heads)
        kh = Transpose<perm=[0,2,1,3]>(kr)
        vr = Reshape(v, {split})
        vh = Transpose<perm=[0,2,1,3]>(vr)
        {attention}
        t = Transpose<perm=[0,2,1,3]>(a)
        y = Reshape(t, {join})
    }}"""


BARE = """g (float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,8] v) => (float[B,4,S,8] y) {
    y = Attention(q, k, v)
}"""


def feeds(queries: int = 9, keys: int = 13, v: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = {"q": (2, queries, 32), "k": (2, keys, 32), "v": (2, keys, v)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in sizes.items()}


@pytest.mark.parametrize("v", [32, 24])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (64, 77)])
@pytest.mark.parametrize("attributes", ["", "<scale=0.7>"])
def test_it_computes_the_same(v: int, queries: int, keys: int, attributes: str) -> None:
    constants = CONSTANTS if v == 32 else {"heads": CONSTANTS["heads"], **V_CONSTANTS}
    model = model_of(block(f"a = Attention{attributes}(qh, kh, vh)", v), constants)
    given = feeds(queries, keys, v)
    (before,) = run(model, given)
    ctx = apply(LowerAttention(), model)
    assert ctx.rewrites == {"attention": 1}
    (after,) = run(model, given)
    assert relative_l2(after, before) < 2e-6


def test_a_wrong_scale_would_be_seen() -> None:
    model = model_of(block("a = Attention<scale=0.7>(qh, kh, vh)"), CONSTANTS)
    (before,) = run(model, feeds())
    apply(LowerAttention(), model)
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    del node.attributes["scale"]
    (after,) = run(model, feeds())
    assert relative_l2(after, before) > 1e-2


def test_the_transposes_go() -> None:
    model = model_of(block(), CONSTANTS)
    apply(LowerAttention(), model)
    assert ops(model) == {"com.microsoft::MultiHeadAttention": 1}
    assert model.opset_imports["com.microsoft"] == 1
    assert model.graph.outputs[0].name == "y"


def test_operands_that_nothing_transposed_are_transposed() -> None:
    model = model_of(BARE)
    rng = np.random.default_rng(2)
    sizes = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 8)}
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in sizes.items()}
    (before,) = run(model, given)
    apply(LowerAttention(), model)
    assert ops(model) == {"Reshape": 4, "Transpose": 4, "com.microsoft::MultiHeadAttention": 1}
    (after,) = run(model, given)
    assert relative_l2(after, before) < 2e-6


def test_another_reader_of_the_heads_still_gets_them() -> None:
    body = block().replace("(float[B,S,32] y)", "(float[B,S,32] y, float[B,4,S,8] z)")
    model = model_of(body.replace("t = Trans", "z = Relu(a)\nt = Trans"), CONSTANTS)
    before = run(model, feeds())
    apply(LowerAttention(), model)
    after = run(model, feeds())
    assert [relative_l2(a, b) < 2e-6 for a, b in zip(after, before, strict=True)] == [True, True]


def test_half_precision() -> None:
    body = block().replace("float[", "float16[")
    model = model_of(body, CONSTANTS)
    given = {name: array.astype(np.float16) for name, array in feeds().items()}
    apply(LowerAttention(), model)
    (after,) = run(model, given)
    (wanted,) = run(
        model_of(block(), CONSTANTS), {n: a.astype(np.float32) for n, a in given.items()}
    )
    assert after.dtype == np.float16
    assert relative_l2(after, wanted) < 1e-3


def test_a_second_time_changes_nothing() -> None:
    model = model_of(block(), CONSTANTS)
    apply(LowerAttention(), model)
    leaves(LowerAttention(), model)


@pytest.mark.parametrize(
    ("attention", "inputs", "reason"),
    [
        ("a = Attention(qh, kh, vh, mask)", ", float[S,T] mask", "a mask or a cache"),
        ("a = Attention<is_causal=1>(qh, kh, vh)", "", "it sets is_causal"),
        ("a = Attention<softcap=5.0>(qh, kh, vh)", "", "it sets softcap"),
    ],
)
def test_leaves_alone(attention: str, inputs: str, reason: str) -> None:
    leaves(LowerAttention(), model_of(block(attention, inputs=inputs), CONSTANTS), reason)


def test_leaves_alone_heads_that_share_keys() -> None:
    body = BARE.replace("float[B,4,T,8] k, float[B,4,T,8] v", "float[B,2,T,8] k, float[B,2,T,8] v")
    leaves(LowerAttention(), model_of(body), "grouped query attention")


def test_leaves_alone_heads_that_are_not_known() -> None:
    body = BARE.replace("[B,4,", "[B,N,")
    leaves(LowerAttention(), model_of(body), "not known")


def test_leaves_alone_operands_of_three_dimensions() -> None:
    body = """g (float[B,S,32] q, float[B,T,32] k, float[B,T,32] v) => (float[B,S,32] y) {
        y = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)
    }"""
    leaves(LowerAttention(), model_of(body), "it sets q_num_heads")
