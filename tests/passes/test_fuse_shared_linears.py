"""fuse_shared_linears: many projections of one input as one product, and what stays as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.passes.fuse_shared_linears import FuseSharedLinears
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run

TOLERANCE = {"float": 5e-6, "float16": 5e-3}
KINDS = pytest.mark.parametrize("kind", sorted(TOLERANCE))


def arrays(kind: str, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    rng = np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float16
    return {name: (rng.standard_normal(s) / 3).astype(dtype) for name, s in shapes.items()}


def context(kind: str = "float", *, biased: bool = False, widths: str = "88886") -> ir.Model:
    """Keys and values of a prompt, ``MatMul(context, Transpose(W)) (+ b)``, summed at the end."""
    lines, shapes = [], {}
    for index, width in enumerate(widths):
        shapes |= {f"w{index}": (int(width), 12)}
        shapes |= {f"b{index}": (int(width),)} if biased else {}
        lines.append(f"t{index} = Transpose<perm=[1,0]>(w{index})")
        lines.append(f"m{index} = MatMul(context, t{index})")
        lines.append(f"p{index} = {f'Add(m{index}, b{index})' if biased else f'Neg(m{index})'}")
        lines.append(f"r{index} = ReduceSum<keepdims=1>(p{index})")
    parts = ", ".join(f"r{index}" for index in range(len(widths)))
    lines.append(f"y = Concat<axis=0>({parts})")
    head = f"g ({kind}[B,S,12] context) => ({kind}[N,1,1] y)"
    return model_of(f"{head} {{ {chr(10).join(lines)} }}", arrays(kind, shapes))


def embedding(kind: str = "float", *, more: str = "") -> ir.Model:
    """What every block makes of the timestep, ``Gemm(t, W, b)``."""
    shapes: dict[str, tuple[int, ...]] = {}
    lines = []
    for index in range(5):
        shapes |= {f"w{index}": (8, 12), f"b{index}": (8,)}
        lines.append(f"p{index} = Gemm<transB=1{more}>(t, w{index}, b{index})")
    lines.append("y = Concat<axis=0>(p4, p0, p1, p2, p3)")
    head = f"g ({kind}[B,12] t) => ({kind}[N,8] y)"
    return model_of(f"{head} {{ {chr(10).join(lines)} }}", arrays(kind, shapes))


@KINDS
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 12), (3, 7, 12)])
def test_projections_of_a_prompt(kind: str, biased: bool, shape: tuple[int, ...]) -> None:
    """Four are as wide as each other; the fifth is not, and stays."""
    model, inputs = context(kind, biased=biased), arrays(kind, {"context": shape})
    wanted = run(context(kind, biased=biased), inputs)[0]
    assert apply(FuseSharedLinears(), model).rewrites == {"shared_linear": 4}
    assert (ops(model)["MatMul"], ops(model)["Split"]) == (2, 1)
    assert relative_l2(run(model, inputs)[0], wanted) <= TOLERANCE[kind]


@KINDS
@pytest.mark.parametrize("batch", [1, 4])
def test_projections_of_the_timestep(kind: str, batch: int) -> None:
    model, inputs = embedding(kind), arrays(kind, {"t": (batch, 12)})
    wanted = run(embedding(kind), inputs)[0]
    assert apply(FuseSharedLinears(), model).rewrites == {"shared_linear": 5}
    assert (ops(model)["Gemm"], ops(model)["Split"]) == (1, 1)
    assert relative_l2(run(model, inputs)[0], wanted) <= TOLERANCE[kind]


def test_again_there_is_nothing_to_do() -> None:
    model = embedding()
    apply(FuseSharedLinears(), model)
    leaves(FuseSharedLinears(), model)


def test_weights_are_concatenated_when_they_are_written() -> None:
    model = context(widths="8888")
    wide = [np.asarray(model.graph.initializers[f"w{i}"].const_value) for i in range(4)]
    apply(FuseSharedLinears(), model)
    (weight,) = [v for n, v in model.graph.initializers.items() if n.endswith("/weight")]
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), np.concatenate(wide))


@pytest.mark.parametrize(
    "model",
    [
        context(widths="888"),  # three: q, k and v of one attention, perhaps
        context(widths="8765"),
        embedding(more=", alpha=0.5"),
        embedding(more=", transA=0, beta=2.0"),
    ],
    ids=["too few", "of different widths", "scaled", "its bias scaled"],
)
def test_what_is_left_as_it_is(model: ir.Model) -> None:
    leaves(FuseSharedLinears(), model)


def test_a_weight_that_a_caller_may_replace_is_left() -> None:
    model = embedding()
    for name in ("w0", "w1"):
        value = model.graph.initializers[name]
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([8, 12])
        model.graph.inputs.append(value)
    leaves(FuseSharedLinears(), model)


def test_products_that_are_outputs_are_left() -> None:
    model = model_of(
        """g (float[B,12] t) => (float[B,8] a, float[B,8] b) {
            a = Gemm<transB=1>(t, w)
            b = Gemm<transB=1>(t, v)
        }""",
        arrays("float", {"w": (8, 12), "v": (8, 12)}),
    )
    leaves(FuseSharedLinears(least=2), model)


def test_one_is_not_many() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        FuseSharedLinears(least=1)
