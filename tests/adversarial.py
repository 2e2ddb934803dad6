"""Small valid graphs that are shaped to trip a rewrite, with what to feed each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Trap:
    """A model and several feeds; the second of an overridable input differs from its default."""

    model: onnx.ModelProto
    feeds: Sequence[Arrays]


@dataclass
class Traps:
    """The table of builders, filled by ``@TRAPS.add``."""

    builders: dict[str, Callable[[], Trap]] = field(default_factory=dict)

    def add(self, builder: Callable[[], Trap]) -> Callable[[], Trap]:
        self.builders[builder.__name__] = builder
        return builder


TRAPS = Traps()


def text(
    body: str, weights: Arrays | None = None, opset: int = 23, domains: str = ""
) -> onnx.ModelProto:
    """A model from ONNX text and initializers, as it would lie in a file."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n'
    model = parser.parse_model(head + body)
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def floats(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


SPELLED = """
    kt = Transpose<perm=[0,1,3,2]>(k)
    s = MatMul(q, kt)
    t = Mul(s, scale)
    p = Softmax<axis=-1>(t)
    o = MatMul(p, v)
"""
"""Attention of q, k, v ``[B, heads, S, D]`` as older exporters write it."""

QKV = "float[B,2,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v"


def qkv(batch: int = 2, length: int = 5, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {
        name: floats(batch, 2, length, 8, seed=index, dtype=dtype)
        for index, name in enumerate("qkv")
    }


def heads(prefix: str, names: str = "qkv", weights: Mapping[str, str] | None = None) -> str:
    """Projections of ``x`` to ``[B, 4, S, 8]`` and the attention of them, ``{prefix}a``."""
    lines = []
    for one in names:
        weight = (weights or {}).get(one, f"w{one}")
        lines += [
            f"{prefix}t{one} = Transpose<perm=[1,0]>({weight})",
            f"{prefix}m{one} = MatMul(x, {prefix}t{one})",
            f"{prefix}r{one} = Reshape({prefix}m{one}, split)",
            f"{prefix}h{one} = Transpose<perm=[0,2,1,3]>({prefix}r{one})",
        ]
    operands = ", ".join(f"{prefix}h{one}" for one in names)
    return "\n".join([*lines, f"{prefix}a = Attention({operands})"])


def projections(**extra: np.ndarray) -> dict[str, np.ndarray]:
    found = {f"w{one}": floats(32, 32, seed=i) / 6 for i, one in enumerate("qkvo")}
    return found | {"split": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32])} | extra


TOKENS = [{"x": floats(2, 6, 32)}, {"x": floats(1, 3, 32, seed=1)}]


# Inputs that the caller may override, and weights with several readers.


@TRAPS.add
def a_scale_that_the_caller_may_override() -> Trap:
    body = f"g ({QKV}, float scale) => (float[B,2,S,8] o) {{ {SPELLED} }}"
    model = text(body, {"scale": np.array(8**-0.5, np.float32)})
    return Trap(model, [qkv(), qkv() | {"scale": np.array(0.1, np.float32)}])


@TRAPS.add
def weights_that_the_caller_may_override() -> Trap:
    body = f"""
    g (float[B,S,32] x, float[32,32] wq, float[32,32] wv) => (float[B,S,32] y) {{
        {heads("")}
        b = Transpose<perm=[0,2,1,3]>(a)
        y = Reshape(b, flat)
    }}"""
    other = TOKENS[0] | {"wq": floats(32, 32, seed=9), "wv": floats(32, 32, seed=8)}
    return Trap(text(body, projections()), [*TOKENS, other])


@TRAPS.add
def constants_that_the_caller_may_override() -> Trap:
    """A one, a shape, an axis, an epsilon and a gamma, each a constant only by default."""
    body = """
    g (float[N,4] x, float[1] one, int64[2] shape, int64[1] axes, float eps, float[4] gamma)
        => (float[M,K] y) {
        a = Mul(x, one)
        b = Reshape(a, shape)
        two = Constant<value_float=2.0>()
        c = Pow(b, two)
        m = ReduceMean<keepdims=1>(c, axes)
        e = Add(m, eps)
        r = Sqrt(e)
        n = Div(b, r)
        y = Mul(n, gamma)
    }"""
    given = {
        "one": np.ones(1, np.float32),
        "shape": np.array([-1, 4]),
        "axes": np.array([-1]),
        "eps": np.array(1e-5, np.float32),
        "gamma": np.ones(4, np.float32),
    }
    changed = {
        "one": np.full(1, 3, np.float32),
        "shape": np.array([4, -1]),
        "axes": np.array([0]),
        "eps": np.array(0.5, np.float32),
        "gamma": np.arange(4, dtype=np.float32),
    }
    return Trap(text(body, given), [{"x": floats(4, 4)}, {"x": floats(4, 4)} | changed])


@TRAPS.add
def one_q_weight_for_two_attentions() -> Trap:
    second = heads("z", weights={"q": "wq", "k": "wo", "v": "wv"})
    body = f"""
    g (float[B,S,32] x) => (float[B,4,S,8] y, float[32,32] seen) {{
        {heads("")}
        {second}
        y = Add(a, za)
        seen = Identity(wq)
    }}"""
    return Trap(text(body, projections()), TOKENS)


@TRAPS.add
def one_weight_for_q_k_and_v() -> Trap:
    same = dict.fromkeys("qkv", "wq")
    body = f"g (float[B,S,32] x) => (float[B,4,S,8] a) {{ {heads('', weights=same)} }}"
    return Trap(text(body, projections()), TOKENS)


@TRAPS.add
def one_projection_for_q_and_k() -> Trap:
    body = f"""
    g (float[B,S,32] x) => (float[B,4,S,8] y) {{
        {heads("")}
        y = Attention(hq, hq, hv)
    }}"""
    return Trap(text(body, projections()), TOKENS)


@TRAPS.add
def a_weight_that_is_an_output() -> Trap:
    body = f"g (float[B,S,32] x) => (float[B,4,S,8] a, float[32,32] wk) {{ {heads('')} }}"
    return Trap(text(body, projections()), TOKENS)


@TRAPS.add
def equal_weights_under_two_names() -> Trap:
    extra = {
        "one": np.array(1, np.float32),
        "uno": np.array(1, np.float32),
        "ii": np.array([2]),
        "jj": np.array([2]),
    }
    body = """
    g (float[N] x) => (float[N] y, float uno, int64[1] jj, float[M] z) {
        a = Add(x, one)
        y = Add(a, uno)
        z = Tile(y, ii)
    }"""
    return Trap(text(body, extra), [{"x": floats(3)}])


# Values that more than the pattern reads.


@TRAPS.add
def probabilities_that_are_an_output() -> Trap:
    body = f"g ({QKV}) => (float[B,2,S,8] o, float[B,2,S,S] p) {{ {SPELLED} }}"
    return Trap(text(body, {"scale": np.array(0.3, np.float32)}), [qkv(), qkv(1, 3)])


@TRAPS.add
def scores_that_are_an_output() -> Trap:
    body = f"g ({QKV}) => (float[B,2,S,S] s, float[B,2,S,8] o, float[B,2,8,S] kt) {{ {SPELLED} }}"
    return Trap(text(body, {"scale": np.array(0.3, np.float32)}), [qkv(), qkv(1, 3)])


@TRAPS.add
def an_if_body_that_captures_the_probabilities() -> Trap:
    body = f"""
    g ({QKV}, bool flag) => (float[B,2,S,8] o, float[B,2,S,S] z) {{
        {SPELLED}
        z = If (flag) <
            then_branch = t1 () => (float[B,2,S,S] u) {{ u = Neg(p) }},
            else_branch = e1 () => (float[B,2,S,S] w) {{ w = Add(s, t) }}
        >
    }}"""
    flags = [{"flag": np.array(flag)} for flag in (True, False)]
    return Trap(text(body, {"scale": np.array(0.3, np.float32)}), [qkv() | flag for flag in flags])


@TRAPS.add
def a_loop_body_that_captures_projections() -> Trap:
    body = f"""
    g (float[B,S,32] x, int64 n) => (float[B,4,S,8] a, float[B,S,32] z) {{
        {heads("")}
        go = Constant<value_int=1>()
        yes = Cast<to=9>(go)
        z = Loop (n, yes, x) <
            body = b (int64 i, bool c, float[B,S,32] before)
                => (bool d, float[B,S,32] after) {{
                d = Identity(c)
                k2 = Mul(mk, before)
                after = Add(k2, mv)
            }}
        >
    }}"""
    return Trap(
        text(body, projections()),
        [one | {"n": np.array(n)} for one, n in zip(TOKENS, (0, 2), strict=False)],
    )


@TRAPS.add
def bodies_with_weights_and_attention_of_their_own() -> Trap:
    inner = "kt = Transpose<perm=[0,1,3,2]>(k)\ns = MatMul(q, kt)\n"
    inner += "c = Constant<value_float=0.25>()\nt = Mul(s, c)\np = Softmax(t)\nu = MatMul(p, v)"
    body = f"""
    g ({QKV}, bool flag) => (float[B,2,S,8] o) {{
        o = If (flag) <
            then_branch = t1 () => (float[B,2,S,8] u) {{ {inner} }},
            else_branch = e1 () => (float[B,2,S,8] w) <float one = {{1}}> {{
                m = Mul(q, one)
                w = Add(m, v)
            }}
        >
    }}"""
    return Trap(text(body), [qkv() | {"flag": np.array(flag)} for flag in (True, False)])


@TRAPS.add
def nested_bodies_that_capture_from_both_levels() -> Trap:
    body = """
    g (float[N] x, bool flag) => (float[N] y) {
        outer = Neg(x)
        same = Identity(outer)
        y = If (flag) <
            then_branch = t1 () => (float[N] a) {
                middle = Add(same, x)
                a = If (flag) <
                    then_branch = t2 () => (float[N] b) { b = Mul(middle, same) },
                    else_branch = e2 () => (float[N] c) { c = Identity(outer) }
                >
            },
            else_branch = e1 () => (float[N] d) { d = Identity(same) }
        >
    }"""
    feeds = [{"x": floats(3), "flag": np.array(flag)} for flag in (True, False)]
    return Trap(text(body), feeds)


@TRAPS.add
def dead_code_that_hangs_together_through_bodies() -> Trap:
    body = """
    g (float[N] x, bool flag) => (float[N] y) {
        a = Neg(x)
        b = If (flag) <
            then_branch = t1 () => (float[N] u) { u = Add(a, x) },
            else_branch = e1 () => (float[N] v) { v = Identity(a) }
        >
        c = If (flag) <
            then_branch = t2 () => (float[N] w) { w = Mul(a, b) },
            else_branch = e2 () => (float[N] z) { z = Identity(b) }
        >
        d = Neg(c)
        y = Abs(x)
    }"""
    feeds = [{"x": floats(3), "flag": np.array(flag)} for flag in (True, False)]
    return Trap(text(body), feeds)


@TRAPS.add
def outputs_that_are_inputs_or_one_value() -> Trap:
    body = """
    g (float[N] x, float[N] z) => (float[N] x, float[N] y, float[N] w) {
        y = Identity(x)
        v = Identity(z)
        w = Identity(v)
    }"""
    return Trap(text(body), [{"x": floats(3), "z": floats(3, seed=2)}])


@TRAPS.add
def no_ops_between_outputs() -> Trap:
    body = """
    g (float[N] x) => (float[N] a, float[N] b, float[N] c, float[N] d) {
        a = Neg(x)
        b = Identity(a)
        c = Mul(b, one)
        d = Transpose<perm=[0]>(c)
    }"""
    return Trap(text(body, {"one": np.array(1, np.float32)}), [{"x": floats(3)}])


# Sizes, types and numbers at the edge.


@TRAPS.add
def softmax_as_opset_11_defines_it() -> Trap:
    body = f"g ({QKV}) => (float[B,2,S,8] o) {{ {SPELLED.replace('axis=-1', 'axis=2')} }}"
    model = text(body, {"scale": np.array(0.3, np.float32)}, opset=11)
    return Trap(model, [qkv(), qkv(1, 3)])


@TRAPS.add
def attention_of_nothing() -> Trap:
    body = f"g ({QKV}) => (float[B,2,S,8] o) {{ {SPELLED} }}"
    model = text(body, {"scale": np.array(0.3, np.float32)})
    return Trap(model, [qkv(), qkv(0, 5), qkv(2, 1), qkv(2, 0)])


@TRAPS.add
def attention_in_double() -> Trap:
    body = f"g ({QKV}) => (float[B,2,S,8] o) {{ {SPELLED} }}".replace("float[", "double[")
    return Trap(text(body, {"scale": np.float64(0.3)}), [qkv(dtype=np.float64)])


@TRAPS.add
def constants_of_shape_one_where_a_scalar_is_meant() -> Trap:
    body = """
    g (float x, float[N] z) => (float[1] y, float[N] w, float[1,1] u) {
        y = Mul(x, one)
        w = Div(z, one)
        u = Mul(y, deep)
    }"""
    weights = {"one": np.ones(1, np.float32), "deep": np.ones((1, 1), np.float32)}
    return Trap(text(body, weights), [{"x": np.array(3, np.float32), "z": floats(4)}])


@TRAPS.add
def a_scale_of_higher_rank_than_the_scores() -> Trap:
    body = f"g ({QKV}) => (float[1,B,2,S,8] o) {{ {SPELLED} }}"
    return Trap(text(body, {"scale": np.full((1, 1, 1, 1, 1), 0.3, np.float32)}), [qkv()])


@TRAPS.add
def constants_that_are_nan_or_infinite() -> Trap:
    body = f"""
    g ({QKV}) => (float[B,2,S,8] o, float[B,2,S,8] n, float f) {{
        kt = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(q, kt)
        t = Mul(s, scale)
        masked = Add(t, mask)
        p = Softmax<axis=-1>(masked)
        o = MatMul(p, v)
        n = Mul(v, nan)
        f = Mul(nan, inf)
    }}"""
    mask = np.triu(np.full((5, 5), -np.inf, np.float32), 1)
    weights = {"scale": np.array(0.3, np.float32), "mask": mask}
    weights |= {"nan": np.array(np.nan, np.float32), "inf": np.array(np.inf, np.float32)}
    return Trap(text(body, weights), [qkv()])


@TRAPS.add
def an_infinite_scale() -> Trap:
    body = f"g ({QKV}) => (float[B,2,S,8] o) {{ {SPELLED} }}"
    return Trap(text(body, {"scale": np.array(np.inf, np.float32)}), [qkv()])


@TRAPS.add
def a_row_that_a_mask_hides_whole() -> Trap:
    body = f"""
    g ({QKV}) => (float[B,2,S,8] o) {{
        {SPELLED.replace("Softmax<axis=-1>(t)", "Softmax<axis=-1>(m)").replace("p =", "m = Add(t, mask) p =")}
    }}"""
    mask = np.zeros((5, 5), np.float32)
    mask[1] = -np.inf
    return Trap(text(body, {"scale": np.array(0.3, np.float32), "mask": mask}), [qkv()])


@TRAPS.add
def empty_and_zero_dimensional_tensors() -> Trap:
    body = """
    g (float[N,0] x, float s) => (float[K] a, float[M] b, float c, float[0] d, int64 e, float[L] f) {
        flat = Reshape(x, all)
        a = Concat<axis=0>(flat, none, one)
        b = Concat<axis=0>(none)
        c = Squeeze(one)
        d = Identity(none)
        e = Size(x)
        back = Reshape(s, all)
        f = Slice(back, lo, hi)
    }"""
    weights = {
        "all": np.array([-1]),
        "none": np.zeros(0, np.float32),
        "one": np.ones(1, np.float32),
        "lo": np.array([0]),
        "hi": np.array([np.iinfo(np.int64).max]),
    }
    body = body.replace("Reshape(x, all)", "Flatten0")
    body = body.replace(
        "flat = Flatten0",
        "total = Shape(x) zero = ReduceProd(total) flat = Reshape<allowzero=1>(x, zero)",
    )
    return Trap(
        text(body, weights), [{"x": np.zeros((3, 0), np.float32), "s": np.array(2, np.float32)}]
    )


@TRAPS.add
def integer_arithmetic_at_the_edge() -> Trap:
    """What folds must fold as ONNX defines it: truncation, wrap-around, the sign of Mod."""
    body = """
    g (int64[N] x) => (int64[4] q, int64[4] m, int64[4] fm, int32[4] w, uint8[2] u, int64[N] z) {
        q = Div(a, b)
        m = Mod(a, b)
        fm = Mod<fmod=1>(a, b)
        w = Add(big, big)
        u = Sub(small, large)
        qq = Div(a, b)
        d = Sub(q, qq)
        first = Gather(d, zero)
        z = Add(x, first)
    }"""
    weights = {
        "a": np.array([7, -7, 7, -7]),
        "b": np.array([2, 2, -2, -2]),
        "big": np.full(4, 2**31 - 1, np.int32),
        "small": np.array([0, 3], np.uint8),
        "large": np.array([1, 255], np.uint8),
        "zero": np.array(0),
    }
    return Trap(text(body, weights), [{"x": np.arange(3)}])


@TRAPS.add
def division_by_a_constant_zero() -> Trap:
    body = """
    g (float[N] x) => (float[N] y, float[2] z) {
        z = Div(one, zero)
        s = Gather(z, at)
        y = Div(x, s)
    }"""
    weights = {"one": np.array([1, -1], np.float32), "zero": np.zeros(2, np.float32)}
    return Trap(text(body, weights | {"at": np.array(1)}), [{"x": floats(3)}])


@TRAPS.add
def casts_at_the_edge() -> Trap:
    body = """
    g (float[N] x) => (float[N] y, float16[3] h, double[2] d, bool[3] b, string[3] s) {
        y = Cast<to=1>(x)
        h = Cast<to=10>(wide)
        long = Cast<to=11>(x2)
        d = Cast<to=11>(long)
        b = Cast<to=9>(wide)
        i = Cast<to=7>(exact)
        s = Cast<to=8>(i)
    }"""
    weights = {
        "wide": np.array([1e6, -1e-9, 0], np.float32),
        "x2": np.array([0.1, -0.0], np.float32),
        "exact": np.array([1.5, -1.5, 2], np.float32),
    }
    return Trap(text(body, weights), [{"x": floats(3)}])


@TRAPS.add
def slices_that_only_look_like_the_whole() -> Trap:
    body = """
    g (float[N] x) => (float[A] a, float[B] b, float[C] c, float[N] d) {
        a = Slice(x, zero, far, axis, back)
        b = Slice(x, zero, last, axis)
        c = Slice(x, minus, far, axis)
        d = Slice(x, zero, far)
    }"""
    weights = {
        "zero": np.array([0]),
        "far": np.array([2**62 + 5]),
        "axis": np.array([0]),
        "back": np.array([2]),
        "last": np.array([-1]),
        "minus": np.array([-2]),
    }
    return Trap(text(body, weights), [{"x": floats(5)}])


@TRAPS.add
def signed_zeros_are_no_equal_constants() -> Trap:
    body = "g (float[N] x) => (float[N] y) { a = Div(x, p) b = Div(x, n) y = Sub(a, b) }"
    weights = {"p": np.array(0.0, np.float32), "n": np.array(-0.0, np.float32)}
    return Trap(text(body, weights), [{"x": np.array([1, -1, 2], np.float32)}])


@TRAPS.add
def group_norm_of_a_single_element() -> Trap:
    body = """
    g (float[N,4,H,W] x) => (float[N,4,H,W] y) {
        r = Reshape(x, groups)
        n = InstanceNormalization<epsilon=1e-5>(r, ones, zeros)
        s = Shape(x)
        b = Reshape(n, s)
        m = Mul(b, gamma)
        y = Add(m, beta)
    }"""
    weights = {
        "groups": np.array([0, 2, -1]),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "gamma": floats(4, 1, 1),
        "beta": floats(1, 4, 1, 1),
    }
    feeds = [{"x": floats(2, 4, 3, 5)}, {"x": floats(1, 4, 1, 1)}, {"x": floats(3, 4, 2, 1)}]
    return Trap(text(body, weights), feeds)


@TRAPS.add
def group_norm_whose_parameters_broadcast_over_width() -> Trap:
    """Gamma of ``[C]`` where W equals C scales columns, not channels."""
    body = """
    g (float[N,4,H,4] x) => (float[N,4,H,4] y) {
        r = Reshape(x, groups)
        n = InstanceNormalization<epsilon=1e-5>(r, ones, zeros)
        s = Shape(x)
        b = Reshape(n, s)
        m = Mul(b, gamma)
        y = Add(m, beta)
    }"""
    weights = {
        "groups": np.array([0, 2, -1]),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "gamma": floats(4),
        "beta": floats(4, seed=1),
    }
    return Trap(text(body, weights), [{"x": floats(2, 4, 3, 4)}])


@TRAPS.add
def layer_norm_with_its_mean_as_an_output() -> Trap:
    body = """
    g (float[N,8] x) => (float[N,8] y, float[N,1] m, float[N,1] r) {
        y, m, r = LayerNormalization(x, gamma, beta)
    }"""
    return Trap(text(body, {"gamma": floats(8), "beta": floats(8)}), [{"x": floats(3, 8)}])


@TRAPS.add
def a_layer_norm_whose_mean_is_read_elsewhere() -> Trap:
    body = """
    g (float[N,8] x) => (float[N,8] y, float[N,1] m, float[N,8] sq) {
        m = ReduceMean<keepdims=1>(x, last)
        d = Sub(x, m)
        sq = Pow(d, two)
        v = ReduceMean<keepdims=1>(sq, last)
        e = Add(v, eps)
        r = Sqrt(e)
        n = Div(d, r)
        s = Mul(n, gamma)
        y = Add(s, beta)
    }"""
    weights = {
        "last": np.array([-1]),
        "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32),
    }
    weights |= {"gamma": floats(8), "beta": floats(8, seed=1)}
    return Trap(text(body, weights), [{"x": floats(3, 8)}, {"x": floats(0, 8)}])


@TRAPS.add
def a_norm_whose_gamma_is_wider_than_its_input() -> Trap:
    body = """
    g (float[N,1] x) => (float[N,8] y) {
        m = ReduceMean<keepdims=1>(x, last)
        d = Sub(x, m)
        sq = Mul(d, d)
        v = ReduceMean<keepdims=1>(sq, last)
        e = Add(v, eps)
        r = Sqrt(e)
        n = Div(d, r)
        s = Mul(n, gamma)
        y = Add(s, beta)
    }"""
    weights = {"last": np.array([-1]), "eps": np.array(1e-5, np.float32)}
    weights |= {"gamma": floats(8), "beta": floats(8, seed=1)}
    return Trap(text(body, weights), [{"x": floats(3, 1)}])


@TRAPS.add
def a_gelu_of_its_own_output_type() -> Trap:
    body = """
    g (double[N] x, float[N] z) => (double[N] y, float[N] w) {
        a = Div(x, root)
        e = Erf(a)
        b = Add(e, one)
        c = Mul(x, b)
        y = Mul(c, half)
        a2 = Mul(z, nearly)
        e2 = Erf(a2)
        b2 = Add(e2, one2)
        c2 = Mul(z, b2)
        w = Mul(c2, half2)
    }"""
    weights = {"root": np.float64(2**0.5), "one": np.float64(1), "half": np.float64(0.5)}
    weights |= {
        "nearly": np.array(0.7, np.float32),
        "one2": np.array(1, np.float32),
        "half2": np.array(0.5, np.float32),
    }
    return Trap(text(body, weights), [{"x": floats(4, dtype=np.float64), "z": floats(4)}])


# Random numbers, sequences, optional outputs, functions.


@TRAPS.add
def equal_draws_are_two_draws() -> Trap:
    body = """
    g (float[N] x) => (float[4] y, float[N] z) {
        a = RandomNormal<shape=[4], seed=1.0>()
        b = RandomNormal<shape=[4], seed=2.0>()
        c = RandomUniform<shape=[4]>()
        d = RandomUniform<shape=[4]>()
        zero = Sub(c, d)
        s = Shape(zero)
        y = Sub(a, b)
        r = ReduceSum<keepdims=0>(s)
        f = Cast<to=1>(r)
        z = Add(x, f)
    }"""
    return Trap(text(body), [{"x": floats(3)}])


@TRAPS.add
def sequences_taken_apart_in_every_way() -> Trap:
    body = """
    g (float[6,4] x) => (float[A,4] a, float[B,4] b, float[C] c, float[D,4] d, seq(float[M,4]) s) {
        s = SplitToSequence<axis=0>(x, three)
        a = SequenceAt(s, first)
        b = SequenceAt(s, minus)
        t = SplitToSequence<axis=0, keepdims=0>(x)
        c = SequenceAt(t, last)
        u = SplitToSequence<axis=-2>(x, parts)
        d = SequenceAt(u, one)
        e = SequenceAt(u, minus)
    }"""
    weights = {
        "three": np.array(3),
        "parts": np.array([1, 5]),
        "first": np.array(0),
        "one": np.array(1),
        "minus": np.array(-1),
        "last": np.array(5),
    }
    return Trap(text(body, weights), [{"x": floats(6, 4)}])


@TRAPS.add
def optional_outputs_that_are_read() -> Trap:
    body = """
    g (float[2,4,6,6] x) => (float[2,4,6,6] y, bool[2,4,6,6] mask, int64[2,4,3,3] at, float[2,4,3,3] p) {
        y, mask = Dropout(x)
        p, at = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
    }"""
    return Trap(text(body), [{"x": floats(2, 4, 6, 6)}])


@TRAPS.add
def dropout_that_trains_only_if_asked() -> Trap:
    body = """
    g (float[N] x, bool training) => (float[N] y) {
        y = Dropout(x, ratio, training)
    }"""
    weights = {"ratio": np.array(0.0, np.float32), "training": np.array(False)}
    return Trap(
        text(body, weights), [{"x": floats(5)}, {"x": floats(5), "training": np.array(True)}]
    )


@TRAPS.add
def attention_with_every_optional_output() -> Trap:
    body = f"""
    g ({QKV}, float[B,2,P,8] pk, float[B,2,P,8] pv)
        => (float[B,2,S,8] o, float[B,2,T,8] nk, float[B,2,T,8] nv, float[B,2,S,T] qk) {{
        o, nk, nv, qk = Attention<scale=0.3>(q, k, v, , pk, pv)
    }}"""
    past = {"pk": floats(2, 2, 3, 8), "pv": floats(2, 2, 3, 8, seed=1)}
    return Trap(text(body), [qkv() | past])


@TRAPS.add
def attention_of_three_dimensional_operands() -> Trap:
    body = """
    g (float[B,S,32] x) => (float[B,S,32] y) {
        tq = Transpose<perm=[1,0]>(wq)
        tk = Transpose<perm=[1,0]>(wk)
        tv = Transpose<perm=[1,0]>(wv)
        q = MatMul(x, tq)
        k = MatMul(x, tk)
        v = MatMul(x, tv)
        y = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)
    }"""
    return Trap(text(body, projections()), TOKENS)


@TRAPS.add
def functions_that_hold_the_pattern() -> Trap:
    model = text(
        f"""
        g ({QKV}) => (float[B,2,S,8] o) {{
            a = mine.spelled<by=0.3>(q, k, v)
            o = mine.twice(a)
        }}
        <domain: "mine", opset_import: ["" : 23]>
        spelled<by>(q, k, v) => (o) {{
            kt = Transpose<perm=[0,1,3,2]>(k)
            s = MatMul(q, kt)
            scale = Constant<value_float: float = @by>()
            t = Mul(s, scale)
            p = Softmax<axis=-1>(t)
            o = MatMul(p, v)
        }}
        <domain: "mine", opset_import: ["" : 23, "mine" : 1]>
        twice(x) => (y) {{
            one = Constant<value_float=1.0>()
            a = Mul(x, one)
            b = Identity(a)
            y = Add(b, x)
        }}
        """,
        domains=', "mine" : 1',
    )
    return Trap(model, [qkv(), qkv(1, 3)])


# Names and order.


@TRAPS.add
def names_that_are_missing_or_taken_twice() -> Trap:
    model = a_scale_that_the_caller_may_override().model
    for node in model.graph.node:
        node.name = "same"
    model.graph.node[0].name = ""
    return Trap(model, [qkv()])


@TRAPS.add
def names_in_every_script() -> Trap:
    body = f"g (float[B,S,32] x) => (float[B,4,S,8] a) {{ {heads('')} }}"
    model = text(body, projections())
    names = {"wq": "权重/q:0", "wk": "poids k", "hq": "🙂", "tq": "a\tb", "mk": "..", "x": "вход"}
    for node in model.graph.node:
        node.name = f"узел,=:+@ {node.op_type}"
        for field_ in (node.input, node.output):
            field_[:] = [names.get(name, name) for name in field_]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    model.graph.input[0].name = names["x"]
    return Trap(model, [{names["x"]: one["x"]} for one in TOKENS])


@TRAPS.add
def names_that_a_pass_would_choose() -> Trap:
    """Values called as Emitter and fuse_qkv name theirs, and a node called like a value."""
    body = f"""
    g (float[B,S,32] x) => (float[B,4,S,8] a, float[32,32] y) {{
        {heads("")}
        y = Neg(taken)
    }}"""
    model = text(body, projections())
    names = {"wq": "b.to_q.weight", "wk": "b.to_k.weight", "wv": "b.to_v.weight"}
    for node in model.graph.node:
        node.name = "b.to_qkv/weight"
        node.input[:] = [
            "b.to_qkv/MatMul" if n == "taken" else names.get(n, n) for n in node.input
        ]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    model.graph.initializer.append(numpy_helper.from_array(floats(32, 32), "b.to_qkv/MatMul"))
    return Trap(model, TOKENS)


@TRAPS.add
def a_chain_of_ten_thousand() -> Trap:
    """Deeper than Python may recurse."""
    nodes = [helper.make_node("Add", [f"v{i}", "c"], [f"v{i + 1}"]) for i in range(10_000)]
    nodes.append(helper.make_node("Identity", ["v10000"], ["y"]))
    ports = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"])]
        for name in ("v0", "y")
    ]
    constant = numpy_helper.from_array(np.array(1, np.float32), "c")
    graph = helper.make_graph(nodes, "g", *ports, [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return Trap(model, [{"v0": floats(2)}])


@TRAPS.add
def a_chain_of_casts_and_scales_before_a_softmax() -> Trap:
    """Three hundred scalings are followed back without recursion or quadratic time."""
    nodes = ["kt = Transpose<perm=[0,1,3,2]>(k)", "t0 = MatMul(q, kt)"]
    nodes += [f"t{i + 1} = Mul(t{i}, c)" for i in range(300)]
    nodes += ["p = Softmax<axis=-1>(t300)", "o = MatMul(p, v)"]
    body = f"g ({QKV}) => (float[B,2,S,8] o) {{ {chr(10).join(nodes)} }}"
    return Trap(text(body, {"c": np.array(0.999, np.float32)}), [qkv()])
