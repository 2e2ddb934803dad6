"""Attention, norms and GELU as older exporters write them, as small graphs in ONNX text."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from tests.toolkit import model_of

HEADS, WIDTH, DEPTH = 2, 8, 4
FLOATS = {"float": np.float32, "float16": np.float16}


def _model(
    body: str, kind: str, inputs: dict[str, str], out: str, opset: int, **weights: np.ndarray
) -> ir.Model:
    arguments = ", ".join(f"{kind}[{shape}] {name}" for name, shape in inputs.items())
    held = {
        name: array.astype(FLOATS[kind]) if array.dtype.kind == "f" else array
        for name, array in weights.items()
        if re.search(rf"\b{name}\b", body)
    }
    return model_of(f"g ({arguments}) => ({kind}[{out}] y) {{\n{body}\n}}", held, opset)


def attention_4d(
    kind: str = "float",
    shape: str = "B,2,S,4",
    *,
    spelling: str = "after",
    scale: float = 0.5,
    keys: str = "kt = Transpose<perm=[0,1,3,2]>(k)",
    axis: int = -1,
) -> ir.Model:
    """MatMul, scale, Softmax, MatMul of ``[B, heads, S, D]``."""
    spelled = {
        "after": "m = MatMul(q, kt)\ns = Mul(m, c)",
        "divided": "m = MatMul(q, kt)\ns = Div(m, inverse)",
        "before": "qs = Mul(c, q)\ns = MatMul(qs, kt)",
        "on keys": "ks = Mul(kt, c)\ns = MatMul(q, ks)",
        "both": "qs = Mul(q, root)\nks = Mul(kt, root)\ns = MatMul(qs, ks)",
        "masked": "m = MatMul(q, kt)\nt = Mul(m, c)\ns = Add(t, mask)",
        "cast": "m = MatMul(q, kt)\nt = Mul(m, c)\ns = Cast<to=1>(t)",
        "shape": "d = Shape<start=3>(q)\nf = Cast<to=1>(d)\nr = Sqrt(f)\nh = CastLike(r, q)\n"
        "m = MatMul(q, kt)\ns = Div(m, h)",
        "masked first": "m = MatMul(q, kt)\nt = Add(m, mask)\ns = Mul(t, c)",
        "narrow mask": "m = MatMul(q, kt)\nt = Mul(m, c)\ns = Add(t, narrow)",
    }[spelling]
    spelled = spelled.replace(
        "h = CastLike(r, q)", f"h = Cast<to={1 if kind == 'float' else 10}>(r)"
    )
    after = f"w = Cast<to={1 if kind == 'float' else 10}>(p)" if spelling == "cast" else ""
    body = f"{keys}\n{spelled}\np = Softmax<axis={axis}>(s)\n{after}\n"
    body += f"y = MatMul({'w' if after else 'p'}, v)"
    inputs = dict.fromkeys("qkv", shape)
    if "BSHD" in keys:
        inputs["k"] = "B,S,2,4" if "B" in shape else "3,5,2,4"
        body = body.replace("BSHD", "0,2,3,1")
    if "mask" in spelling:
        length = "S,S" if "S" in shape else "5,5"
        inputs |= (
            {"narrow": length.split(",")[0]} if spelling == "narrow mask" else {"mask": length}
        )
    constants = {"c": scale, "inverse": 1 / scale, "root": scale**0.5}
    weights = {name: np.array(number) for name, number in constants.items()}
    return _model(body, kind, inputs, shape, 17, **weights)


def attention_3d(kind: str = "float", *, shape: str = "B,S,8", dynamic: bool = True) -> ir.Model:
    """diffusers' AttnProcessor: heads in the batch, and ``baddbmm``'s Add of zeros."""
    lines = []
    for one in "qkv":
        lines += [
            f"m{one} = MatMul(x, w{one})",
            f"r{one} = Reshape(m{one}, split)",
            f"t{one} = Transpose<perm=[0,2,1,3]>(r{one})",
            f"h{one} = Reshape(t{one}, merged)",
        ]
    if dynamic:
        lines = [
            "size = Shape(x)",
            "b = Gather(size, zero)",
            "n = Gather(size, first)",
            "bh = Mul(b, heads)",
            "split = Concat<axis=0>(b, n, heads, depth)",
            "merged = Concat<axis=0>(bh, n, depth)",
            "joined = Concat<axis=0>(b, n, width)",
            "square = Concat<axis=0>(bh, n, n)",
            *lines,
        ]
    # ONNX text has no float16 literals.
    to = 1 if kind == "float" else 10
    lines += [
        "single = ConstantOfShape<value = float[1] {0.0}>(square)",
        f"empty = Cast<to={to}>(single)",
        "zeros = Mul(empty, none)",
        "kt = Transpose<perm=[0,2,1]>(hk)",
        "m = MatMul(hq, kt)",
        "scaled = Mul(m, c)",
        "s = Add(scaled, zeros)",
        "p = Softmax<axis=-1>(s)",
        "o = MatMul(p, hv)",
    ]
    lines += ["back = Reshape(o, split_back)"]
    if dynamic:
        lines[-1:] = [
            "osize = Shape(o)",
            "obh = Gather(osize, zero)",
            "on = Gather(osize, first)",
            "ob = Div(obh, heads)",
            "split_back = Concat<axis=0>(ob, heads, on, depth)",
            "back = Reshape(o, split_back)",
        ]
    lines += ["tb = Transpose<perm=[0,2,1,3]>(back)", "y = Reshape(tb, joined)"]
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {f"w{one}": rng.standard_normal((8, 8)) / 3 for one in "qkv"}
    weights |= {"c": np.array(0.5), "none": np.array(0.0)}
    weights |= {"zero": np.array([0]), "first": np.array([1])}
    weights |= {"heads": np.array([2]), "depth": np.array([4]), "width": np.array([8])}
    if not dynamic:
        batch, length = (int(size) for size in shape.split(",")[:2])
        weights |= {"split": np.array([batch, length, 2, 4])}
        weights |= {"merged": np.array([batch * 2, length, 4])}
        weights |= {"square": np.array([batch * 2, length, length])}
        weights |= {"split_back": np.array([batch, 2, length, 4])}
        weights |= {"joined": np.array([batch, length, 8])}
    return _model("\n".join(lines), kind, {"x": shape}, shape, 17, **weights)


def group_norm(
    kind: str = "float",
    shape: str = "B,8,H,W",
    *,
    target: tuple[int, ...] = (0, 4, -1),
    epsilon: float = 1e-5,
    ones: float = 1.0,
    affine: bool = True,
) -> ir.Model:
    """Reshape, InstanceNormalization, Reshape, Mul, Add."""
    rng = np.random.default_rng(0)
    body = f"""size = Shape(x)
        r = Reshape(x, groups)
        i = InstanceNormalization<epsilon={epsilon:f}>(r, ones, zeros)
        {"b" if affine else "y"} = Reshape(i, size)"""
    if affine:
        body += "\nm = Mul(b, gamma)\ny = Add(m, beta)"
    weights = {"gamma": rng.standard_normal((8, 1, 1)), "beta": rng.standard_normal((8, 1, 1))}
    weights |= {"ones": np.full(target[1], ones), "zeros": np.zeros(target[1])}
    groups = np.array(target)
    return _model(body, kind, {"x": shape}, shape, 17, groups=groups, **weights)


def layer_norm(
    kind: str = "float",
    shape: str = "B,S,8",
    *,
    spelling: str = "div",
    centred: bool = True,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> ir.Model:
    """LayerNorm from primitives, or RMSNorm where nothing is subtracted; opset 14."""
    d = "d" if centred else "x"
    lines = [f"mean = ReduceMean<axes=[{axis}]>(x)", "d = Sub(x, mean)"] if centred else []
    lines += [
        f"sq = {'Mul' if spelling == 'mul' else 'Pow'}({d}, {d if spelling == 'mul' else 'two'})"
    ]
    lines += [f"var = ReduceMean<axes=[{axis}]>(sq)", "ve = Add(var, eps)", "root = Sqrt(ve)"]
    if spelling == "div":
        lines += [f"n = Div({d}, root)"]
    else:
        lines += ["inv = Reciprocal(root)", f"n = Mul({d}, inv)"]
    lines += ["ng = Mul(n, gamma)", "y = Add(ng, beta)"] if centred else ["y = Mul(gamma, n)"]
    rng = np.random.default_rng(0)
    weights = {"gamma": rng.standard_normal(8), "beta": rng.standard_normal(8)}
    weights |= {"two": np.array(2.0), "eps": np.array(epsilon)}
    return _model("\n".join(lines), kind, {"x": shape}, shape, 14, **weights)


GELUS = {
    "x(1+erf)half": "e = Div(x, root)\nf = Erf(e)\na = Add(f, one)\nb = Mul(x, a)\n"
    "y = Mul(b, half)",
    "half(x)(1+erf)": "e = Mul(x, inv)\nf = Erf(e)\na = Add(one, f)\nh = Mul(half, x)\n"
    "y = Mul(h, a)",
    "(1+erf)half x": "e = Div(x, root)\nf = Erf(e)\na = Add(f, one)\nb = Mul(a, half)\n"
    "y = Mul(b, x)",
    "tanh": "p = Pow(x, three)\nq = Mul(p, k)\nr = Add(x, q)\ns = Mul(r, t)\nf = Tanh(s)\n"
    "a = Add(f, one)\nh = Mul(x, half)\ny = Mul(h, a)",
    "fast": "u = Mul(x, t)\np = Mul(k, x)\nq = Mul(p, x)\nr = Add(q, one)\ns = Mul(u, r)\n"
    "f = Tanh(s)\na = Add(one, f)\nh = Mul(x, half)\ny = Mul(h, a)",
}


def gelu(spelling: str, kind: str = "float", shape: str = "B,6", **constants: float) -> ir.Model:
    """GELU with its multiplications in some order; ``constants`` replace the right ones."""
    numbers = {"root": 2**0.5, "inv": 2**-0.5, "one": 1.0, "half": 0.5, "three": 3.0}
    numbers |= {"k": 0.044715, "t": (2 / np.pi) ** 0.5, **constants}
    arrays = {name: np.array(number) for name, number in numbers.items()}
    return _model(GELUS[spelling], kind, {"x": shape}, shape, 17, **arrays)
