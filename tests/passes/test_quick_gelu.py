from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdopt.passes.quick_gelu import QuickGelu
from tests import ascend_ops
from tests.toolkit import Arrays, apply, leaves, model_of, ops, relative_l2, run

ASCEND = QuickGelu("ascend")
TIGHT, HALF = 2e-6, 5e-3


def geglu(
    *,
    batch: int | str = 2,
    tokens: int | str = 16,
    width: int = 32,
    gate: str = "b",
    attributes: str = "",
    product: str = "",
    axis: int = -1,
    kind: str = "float",
) -> ir.Model:
    """A projection to twice the width, of which ``gate`` (a, b or the whole p) is the gate."""
    real = np.float16 if kind == "float16" else np.float32
    rng = np.random.default_rng(0)
    weights: Arrays = {
        "w": (rng.standard_normal((8, 2 * width)) / 2).astype(real),
        "sizes": np.array([width, width]),
    }
    value = "b" if gate == "a" else "a"
    return model_of(
        f"""g ({kind}[{batch},{tokens},8] x) => ({kind}[{batch},{tokens},{width}] y) {{
            p = MatMul(x, w)
            a, b = Split<axis={axis}>(p, sizes)
            g = Gelu{attributes}({gate})
            y = {product or f"Mul({value}, g)"}
        }}""",
        weights,
    )


def feed(tokens: int = 16, kind: type = np.float32) -> Arrays:
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((2, tokens, 8)).astype(kind)}


def wanted(model: ir.Model, given: Arrays) -> np.ndarray:
    """What PyTorch makes of GEGLU with the activation that transformers calls quick_gelu."""
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    joined = torch.tensor(given["x"].astype(np.float64)) @ torch.tensor(
        weight.numpy().astype(np.float64)
    )
    value, gate = joined.chunk(2, dim=-1)
    return (value * gate * torch.sigmoid(1.702 * gate)).numpy()


@pytest.mark.parametrize("tokens", [16, 33])
def test_standard(tokens: int) -> None:
    model = geglu(tokens="S")
    (exact,) = run(model, feed(tokens))
    assert apply(QuickGelu(), model).rewrites == {"gelu": 1}
    assert ops(model) == {"MatMul": 1, "Split": 1, "Mul": 3, "Sigmoid": 1}
    (after,) = run(model, feed(tokens))
    assert relative_l2(after, wanted(model, feed(tokens))) < TIGHT
    assert 1e-4 < relative_l2(after, exact) < 5e-2, "an approximation, and no more than that"


def test_how_far_off_it_is() -> None:
    body = "g (float[N] x) => (float[N] y) { y = Gelu(x) }"
    model, x = model_of(body), np.linspace(-8, 8, 4001, dtype=np.float32)
    (exact,) = run(model, {"x": x})
    apply(QuickGelu(), model)
    worst = np.abs(run(model, {"x": x})[0] - exact).max()
    assert 0.0200 < worst < 0.0210


def test_standard_in_half_precision() -> None:
    model = geglu(kind="float16")
    apply(QuickGelu(), model)
    (after,) = run(model, feed(kind=np.float16))
    assert after.dtype == np.float16
    assert relative_l2(after, wanted(model, feed(kind=np.float16))) < HALF


@pytest.mark.parametrize(("tokens", "width"), [(16, 32), (64, 16), (4096, 16)])
def test_the_kernel_in_a_float32_graph(tokens: int, width: int) -> None:
    model = geglu(tokens=tokens, width=width)
    assert apply(ASCEND, model).rewrites == {"geglu": 1}
    assert ops(model) == {"MatMul": 1, "Cast": 2, "SliceTransGeluMul": 1}
    given = feed(tokens)
    (exact,) = ascend_ops.run(model, given, precise=True)
    assert relative_l2(exact, wanted(model, given)) < TIGHT
    assert relative_l2(ascend_ops.run(model, given)[0], wanted(model, given)) < HALF


def test_the_kernel_in_a_half_precision_graph() -> None:
    model = geglu(kind="float16", batch="B")
    apply(ASCEND, model)
    assert ops(model) == {"MatMul": 1, "SliceTransGeluMul": 1}
    kernel = model.graph[-1]
    assert (kernel.domain, len(kernel.attributes), len(kernel.inputs)) == ("", 0, 1)
    assert kernel.outputs[0].name == "y"
    given = feed(kind=np.float16)
    assert relative_l2(ascend_ops.run(model, given)[0], wanted(model, given)) < HALF


def test_either_order_of_the_product() -> None:
    model = geglu(product="Mul(g, a)")
    apply(ASCEND, model)
    assert relative_l2(ascend_ops.run(model, feed())[0], wanted(model, feed())) < HALF


def test_a_split_into_two_without_sizes() -> None:
    model = geglu()
    split = next(node for node in model.graph if node.op_type == "Split")
    split.resize_inputs(1)
    split.attributes["num_outputs"] = ir.AttrInt64("num_outputs", 2)
    apply(ASCEND, model)
    assert relative_l2(ascend_ops.run(model, feed())[0], wanted(model, feed())) < HALF


def test_a_split_into_uneven_parts_stays() -> None:
    model = model_of(
        """g (float[2,16,64] x) => (float[2,16,16] y) {
            a, b = Split<axis=-1>(x, sizes)
            g = Gelu(b)
            m = Mul(a, g)
            y = Identity(m)
        }""",
        {"sizes": np.array([1, 63])},
    )
    leaves(ASCEND, model, "no half of the last axis")


def test_the_other_half_as_the_gate_would_be_seen() -> None:
    model = geglu(gate="a")
    assert relative_l2(run(model, feed())[0], wanted(model, feed())) > 1e-1


@pytest.mark.parametrize("one", [QuickGelu(), ASCEND], ids=["standard", "ascend"])
def test_a_second_time_changes_nothing(one: QuickGelu) -> None:
    model = geglu()
    (kind,) = apply(one, model).rewrites
    leaves(one, model)
    assert apply(one, model).present == {kind: 1}


def test_silu_is_no_quick_gelu() -> None:
    body = "g (float[N] x) => (float[N] y) { s = Sigmoid(x)\n y = Mul(x, s) }"
    assert apply(QuickGelu(), model_of(body)).present == {}


@pytest.mark.parametrize(
    ("one", "model", "reason"),
    [
        (QuickGelu(), geglu(attributes='<approximate="tanh">'), "approximation with tanh"),
        (ASCEND, geglu(attributes='<approximate="tanh">'), "approximation with tanh"),
        (ASCEND, geglu(gate="a"), "takes the second half as the gate of the first"),
        (ASCEND, geglu(tokens=17), "multiples of 16, and it has 17 tokens of 32"),
        (ASCEND, geglu(width=24), "multiples of 16, and it has 16 tokens of 24"),
        (ASCEND, geglu(tokens="S"), "its number of tokens is not fixed"),
        (ASCEND, geglu(product="Add(a, g)"), "it gates no half of a projection"),
        (ASCEND, geglu(tokens=64, axis=1), "it gates no half of the last axis"),
        (
            ASCEND,
            model_of("g (float[2,16,32] x) => (float[2,16,32] y) { y = Gelu(x) }"),
            "quick_gelu without kernel takes it",
        ),
        (
            ASCEND,
            model_of(
                """g (float[16,64] x) => (float[16,32] y) {
                    a, b = Split<axis=-1, num_outputs=2>(x)
                    g = Gelu(b)
                    y = Mul(a, g)
                }"""
            ),
            "is not known to be [B, S, 2 * C]",
        ),
    ],
)
def test_leaves_alone(one: QuickGelu, model: ir.Model, reason: str) -> None:
    leaves(one, model, reason)


def test_options_go_round() -> None:
    assert (str(QuickGelu()), str(ASCEND)) == ("quick_gelu", "quick_gelu:kernel=ascend")
