"""fuse_geglu: bias, halves, GELU and product as one node where the kernel is compiled for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.passes.fuse_geglu import FuseGeglu
from tests.microsoft_ops import standard
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run

TOLERANCE = {"float": 5e-6, "float16": 5e-3}


def arrays(kind: str, **shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float16
    return {name: (rng.standard_normal(s) / 3).astype(dtype) for name, s in shapes.items()}


def geglu(
    kind: str = "float",
    width: int = 2560,
    *,
    bias: bool = True,
    gate: int = 1,
    gelu: str = "Gelu",
    parts: int = 2,
) -> ir.Model:
    """The projection ``[B, S, 4] -> [B, S, width]`` and what follows it."""
    names = [f"p{index}" for index in range(parts)]
    body = f"""
        m = MatMul(x, w)
        {"h = Add(m, b)" if bias else "h = Identity(m)"}
        {", ".join(names)} = Split<axis=-1, num_outputs={parts}>(h)
        g = {gelu}(p{gate})
        y = Mul(p{1 - gate}, g)"""
    half = width // parts
    weights = arrays(kind, w=(4, width), b=(width,))
    model = model_of(
        f"g ({kind}[B,S,4] x) => ({kind}[B,S,{half}] y) {{ {body} }}",
        weights if bias else {"w": weights["w"]},
    )
    dtype = ir.DataType.FLOAT if kind == "float" else ir.DataType.FLOAT16
    for node in model.graph:
        for value in node.outputs:
            size = width if value.name in ("m", "h") else half
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(["B", "S", size])
    return model


@pytest.mark.parametrize("kind", sorted(TOLERANCE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 3), (2, 5)])
def test_geglu(kind: str, bias: bool, size: tuple[int, int]) -> None:
    inputs = arrays(kind, x=(*size, 4))
    model = geglu(kind, bias=bias)
    assert apply(FuseGeglu(), model).rewrites == {"geglu": 1}
    assert not {"Add", "Split", "Gelu", "Mul"} & set(ops(model))
    assert standard(model) == 1
    wanted = run(geglu(kind, bias=bias), inputs)[0]
    assert relative_l2(run(model, inputs)[0], wanted) <= TOLERANCE[kind]


@pytest.mark.parametrize("width", [2560, 5120, 10240])
def test_every_width_of_the_kernel(width: int) -> None:
    assert apply(FuseGeglu(), geglu(width=width)).rewrites == {"geglu": 1}


LEFT = {
    "another width": (lambda: geglu(width=512), "512 wide"),
    "the first half as gate": (lambda: geglu(gate=0), "the value and the gate"),
    "tanh": (lambda: geglu(gelu='Gelu<approximate="tanh">'), "tanh approximation"),
    "three parts": (lambda: geglu(width=7680, parts=3), "3 outputs"),
    "another activation": (lambda: geglu(gelu="Sigmoid"), ""),
}


@pytest.mark.parametrize("case", sorted(LEFT))
def test_what_is_left_alone(case: str) -> None:
    build, reason = LEFT[case]
    leaves(FuseGeglu(), build(), reason)
