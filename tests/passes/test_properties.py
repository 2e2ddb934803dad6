"""The fusions and lowerings at shapes that nobody chose: outputs before and after are the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from sdopt.passes.base import Pass
from sdopt.passes.flash_attention import FlashAttention
from sdopt.passes.fuse_geglu import FuseGeglu
from sdopt.passes.fuse_qkv import FuseQkv
from sdopt.passes.lower_attention import LowerAttention
from sdopt.passes.lower_channels_last import LowerChannelsLast
from sdopt.passes.lower_group_norm import LowerGroupNorm
from sdopt.tolerance import FP32_REASSOCIATED
from tests.microsoft_ops import standard
from tests.passes.attention_graphs import Sizes, block, feeds
from tests.passes.test_fuse_geglu import geglu
from tests.toolkit import Arrays, apply, model_of, ops, relative_l2, run

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def drawn(**shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(sum(map(len, shapes)))
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def projected(
    heads: int, size: int, v_size: int, width: int, context: int, bias: str, stored: bool
) -> ir.Model:
    """Attention of x ``[B, S, width]``, with keys and values of c if ``context`` is a width."""
    sources = {"q": ("x", width), "k": ("c", context) if context else ("x", width)}
    sources["v"] = sources["k"]
    weights = {"qs": np.array([0, 0, heads, size]), "ks": np.array([0, 0, heads, size])}
    weights["vs"] = np.array([0, 0, heads, v_size])
    lines = []
    for one, (source, wide) in sources.items():
        out = heads * (v_size if one == "v" else size)
        matrix = drawn(w=(wide, out))["w"] / wide**0.5
        weights[f"w{one}"] = matrix if stored else np.ascontiguousarray(matrix.T)
        right = f"w{one}" if stored else f"t{one}"
        lines += [] if stored else [f"t{one} = Transpose<perm=[1,0]>(w{one})"]
        lines.append(f"m{one} = MatMul({source}, {right})")
        if one in bias:
            weights[f"b{one}"] = drawn(b=(out,))["b"]
            lines.append(f"p{one} = Add(m{one}, b{one})")
        joined = f"p{one}" if one in bias else f"m{one}"
        lines.append(f"r{one} = Reshape({joined}, {one}s)")
        lines.append(f"h{one} = Transpose<perm=[0,2,1,3]>(r{one})")
    inputs = f"float[B,S,{width}] x" + (f", float[B,T,{context}] c" if context else "")
    body = "\n".join([*lines, "y = Attention(hq, hk, hv)"])
    return model_of(f"g ({inputs}) => (float[B,{heads},S,{v_size}] y) {{\n{body}\n}}", weights)


@few
@given(
    heads=st.integers(1, 4),
    size=st.integers(1, 9),
    v_size=st.integers(1, 9),
    width=st.integers(1, 20),
    context=st.one_of(st.just(0), st.integers(1, 20)),
    bias=st.sampled_from(["", "q", "kv", "qkv"]),
    stored=st.booleans(),
    batch=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_fuse_qkv(
    heads: int,
    size: int,
    v_size: int,
    width: int,
    context: int,
    bias: str,
    stored: bool,
    batch: int,
    lengths: tuple[int, int],
) -> None:
    model = projected(heads, size, v_size, width, context, bias, stored)
    given_ = drawn(x=(batch, lengths[0], width))
    given_ |= drawn(c=(batch, lengths[1], context)) if context else {}
    (before,) = run(model, given_)
    assert ops(model)["MatMul"] == 3
    kind = "cross_attention_kv" if context else "self_attention_qkv"
    assert apply(FuseQkv(), model).rewrites == {kind: 1}
    assert ops(model)["MatMul"] == (2 if context else 1)
    (after,) = run(model, given_)
    assert after.shape == (batch, heads, lengths[0], v_size)
    assert relative_l2(after, before) <= FP32_REASSOCIATED


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Sizes, str, str]:
    """Sizes, attributes and mask of an Attention."""
    kv_heads, share = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries = draw(st.integers(1, 12))
    causal = draw(st.booleans())
    sizes = Sizes(
        batch=draw(st.integers(1, 3)),
        queries=queries,
        keys=queries if causal else draw(st.integers(1, 12)),
        heads=kv_heads * share,
        kv_heads=kv_heads,
        size=draw(st.integers(1, 9)),
        v_size=draw(st.integers(1, 9)),
    )
    dims = [sizes.batch, sizes.heads, sizes.queries, sizes.keys]
    dims[: draw(st.integers(0, 2))] = []
    kind = draw(st.sampled_from(["float", "bool"]))
    mask = draw(st.sampled_from(["", f"{kind}[{','.join(map(str, dims))}]"]))
    scale = draw(st.sampled_from(["", "scale=0.3"]))
    found = ", ".join(filter(None, [scale, "is_causal=1" if causal else ""]))
    return sizes, f"<{found}>" if found else "", mask


def attention_is_kept(one: Pass, form: tuple[Sizes, str, str]) -> dict[str, int]:
    """Apply a pass to that attention, compare with onnx's own evaluator, return the operators."""
    sizes, attributes, mask = form
    model = block(sizes, attributes=attributes, mask=mask)
    given_ = feeds(model)
    wanted = ReferenceEvaluator(ir.to_proto(model)).run(None, given_)[0]
    apply(one, model)
    (after,) = run(model, given_)
    assert after.shape == wanted.shape
    assert relative_l2(after, wanted) <= FP32_REASSOCIATED
    return ops(model)


@few
@given(attentions())
def test_lower_attention(form: tuple[Sizes, str, str]) -> None:
    assert "Attention" not in attention_is_kept(LowerAttention(), form)


@few
@given(attentions())
def test_flash_attention_ort(form: tuple[Sizes, str, str]) -> None:
    sizes, attributes, mask = form
    left = sizes.heads != sizes.kv_heads or ("bool" in mask and "causal" in attributes)
    left |= mask.startswith("bool") and mask.count(",") == 3 and sizes.heads > 1
    left |= mask.startswith("bool") and mask.count(",") == 2 and sizes.heads > 1
    assert ("Attention" in attention_is_kept(FlashAttention("ort"), form)) is left


@few
@given(
    groups=st.integers(1, 5),
    share=st.integers(1, 5),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    epsilon=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_lower_group_norm(
    groups: int, share: int, size: tuple[int, int, int], epsilon: float
) -> None:
    channels, (batch, height, width) = groups * share, size
    weights = drawn(scale=(channels,), bias=(channels,))
    body = f"y = GroupNormalization<num_groups={groups}, epsilon={epsilon}>(x, scale, bias)"
    shape = f"[B,{channels},H,W]"
    model = model_of(f"g (float{shape} x) => (float{shape} y) {{ {body} }}", weights)
    x = drawn(x=(batch, channels, height, width))["x"]
    assert apply(LowerGroupNorm(), model).rewrites == {"group_norm": 1}
    (after,) = run(model, {"x": x})
    flat = x.astype(np.float64).reshape(batch, groups, -1)
    normal = flat - flat.mean(-1, keepdims=True)
    normal /= np.sqrt(flat.var(-1, keepdims=True) + epsilon)
    scale, bias = (weights[name].reshape(-1, 1, 1) for name in ("scale", "bias"))
    assert relative_l2(after, normal.reshape(x.shape) * scale + bias) <= FP32_REASSOCIATED


@settings(few, max_examples=6)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.sampled_from([2560, 5120]),
    bias=st.booleans(),
)
def test_fuse_geglu(size: tuple[int, int], width: int, bias: bool) -> None:
    model, x = geglu(width=width, bias=bias), drawn(x=(*size, 4))
    (before,) = run(model, x)
    assert apply(FuseGeglu(), model).rewrites == {"geglu": 1}
    assert standard(model) == 1
    assert relative_l2(run(model, x)[0], before) <= FP32_REASSOCIATED


@few
@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9)),
    silu=st.booleans(),
)
def test_lower_channels_last(
    channels: tuple[int, int, int],
    kernel: tuple[int, int],
    pads: tuple[int, int, int, int],
    strides: tuple[int, int],
    size: tuple[int, int, int],
    silu: bool,
) -> None:
    (inside, groups, share), (batch, height, width) = channels, size
    out = groups * share
    made = f"pads={[*pads]}, strides={[*strides]}, kernel_shape={[*kernel]}"
    model = model_of(
        f"""g (float[B,{inside},H,W] x) => (float[B,{out},P,Q] y) {{
            c = Conv<{made}>(x, w, b)
            n = GroupNormalization<num_groups={groups}>(c, scale, bias)
            {"z = Sigmoid(n) y = Mul(n, z)" if silu else "y = Identity(n)"}
        }}""",
        drawn(w=(out, inside, *kernel), b=(out,), scale=(out,), bias=(out,)),
    )
    for node in model.graph:
        for value in node.outputs:
            value.type, value.shape = (
                ir.TensorType(ir.DataType.FLOAT),
                ir.Shape(["B", out, "P", "Q"]),
            )
    x = drawn(x=(batch, inside, height, width))
    (before,) = run(model, x)
    assert apply(LowerChannelsLast(), model).rewrites == {"conv": 1, "group_norm": 1}
    assert standard(model) == 2
    (after,) = run(model, x)
    assert after.shape == before.shape
    assert relative_l2(after, before) <= FP32_REASSOCIATED
