"""Attentions as exporters write them, for the tests of the passes that lower them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tests.toolkit import Arrays, model_of


@dataclass(frozen=True)
class Sizes:
    """Of one attention; names for dynamic ones."""

    batch: int | str = "B"
    queries: int | str = "S"
    keys: int | str = "T"
    heads: int = 4
    kv_heads: int = 4
    size: int = 8
    v_size: int = 8


def block(
    sizes: Sizes = Sizes(),
    *,
    attributes: str = "",
    mask: str = "",
    kind: str = "float",
    self_attention: bool = False,
    projected: bool = False,
    bias: bool = False,
    stored: bool = False,
    extra: str = "",
    outputs: str = "",
) -> ir.Model:
    """Attention of ``[B, S, heads * D]`` inputs q, k, v, split into heads and joined again.

    With ``self_attention`` all three are projections of the input q, with ``projected`` k and v
    of the input k; ``stored`` keeps weights as ``[in, out]``. ``mask`` is the type and shape of a
    fourth input, such as ``float[S,T]``.
    """
    z = sizes
    width, kv, out = z.heads * z.size, z.kv_heads * z.size, z.heads * z.v_size
    widths = {"q": width, "k": kv, "v": z.kv_heads * z.v_size}
    rng = np.random.default_rng(3)
    weights: Arrays = {
        "q_heads": np.array([0, 0, z.heads, z.size]),
        "k_heads": np.array([0, 0, z.kv_heads, z.size]),
        "v_heads": np.array([0, 0, z.kv_heads, z.v_size]),
        "flat": np.array([0, 0, out]),
    }
    inputs = {"q": (z.queries, width)}
    sources = {"q": "q", "k": "k", "v": "v"}
    lines = []
    if self_attention or projected:
        sources |= {one: "q" if self_attention else ("q" if one == "q" else "k") for one in "qkv"}
        for one in "qkv":
            matrix = rng.standard_normal((width, widths[one])) / width**0.5
            real = np.float16 if kind == "float16" else np.float32
            weights[f"w{one}"] = (matrix if stored else matrix.T.copy()).astype(real)
            right = f"w{one}" if stored else f"u{one}"
            lines += [] if stored else [f"u{one} = Transpose<perm=[1,0]>(w{one})"]
            lines.append(f"m{one} = MatMul({sources[one]}, {right})")
            if bias:
                weights[f"b{one}"] = rng.standard_normal(widths[one]).astype(real)
                lines.append(f"p{one} = Add(m{one}, b{one})")
            sources[one] = f"p{one}" if bias else f"m{one}"
    if projected and not self_attention:
        inputs["k"] = (z.keys, width)
    elif not self_attention:
        inputs |= {"k": (z.keys, kv), "v": (z.keys, widths["v"])}
    for one in "qkv":
        lines += [
            f"{one}r = Reshape({sources[one]}, {one}_heads)",
            f"{one}h = Transpose<perm=[0,2,1,3]>({one}r)",
        ]
    operands = "qh, kh, vh, mask" if mask else "qh, kh, vh"
    lines += [
        f"a = Attention{attributes}({operands})",
        extra,
        "t = Transpose<perm=[0,2,1,3]>(a)",
        "y = Reshape(t, flat)",
    ]
    signature = [f"{kind}[{z.batch},{n},{w}] {name}" for name, (n, w) in inputs.items()]
    signature += [f"{mask} mask"] if mask else []
    body = "\n".join(lines)
    text = f"g ({', '.join(signature)}) => ({kind}[{z.batch},{z.queries},{out}] y{outputs})"
    return model_of(f"{text} {{\n{body}\n}}", weights)


def bare(
    shape: str, kv_shape: str = "", attributes: str = "", kind: str = "float", mask: str = ""
) -> ir.Model:
    """One Attention of the graph's inputs; the shapes are text such as ``B,4,S,8``."""
    kv = kv_shape or shape.replace("S", "T")
    extra, operand = (f", {mask} mask", ", mask") if mask else ("", "")
    return model_of(
        f"""g ({kind}[{shape}] q, {kind}[{kv}] k, {kind}[{kv}] v{extra}) => ({kind}[{shape}] y) {{
            y = Attention{attributes}(q, k, v{operand})
        }}"""
    )


def hidden_rows(model: ir.Model, **sizes: int) -> Arrays:
    """``feeds`` with a bool mask that hides every key of the second query."""
    given = feeds(model, **sizes)
    given["mask"][..., 1, :] = False
    return given


def feeds(model: ir.Model, **sizes: int) -> Arrays:
    """Random inputs; dynamic dimensions have the given sizes, a bool mask every first key."""
    rng = np.random.default_rng(1)
    given: Arrays = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        dims = [d if isinstance(d, int) else sizes[d.value or ""] for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            given[value.name or ""] = np.broadcast_to(rng.random(dims) < 0.7, dims) | (
                np.arange(dims[-1]) == 0
            )
        else:
            given[value.name or ""] = rng.standard_normal(dims).astype(value.dtype.numpy())
    return given
