"""lift_scalars: the same numbers whether a scalar input is declared with an axis or without."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.passes.lift_scalars import LiftScalars
from tests.toolkit import apply, leaves, model_of, ops, run

WEIGHTS = {"zero": np.array([0]), "ones": np.array([0, 1]), "f": np.array([0.5, 2], np.float32)}
HEAD = "g (float t, float[B,2] x) => (float[B,2] y)"
UNSQUEEZED = HEAD + " { u = Unsqueeze(t, zero) m = Mul(u, f) y = Add(x, m) }"
SCALAR = HEAD + " { m = Mul(t, f) a = Add(m, t) y = Add(x, a) }"
BOTH = HEAD + " { u = Unsqueeze(t, zero) m = Mul(t, f) a = Add(m, u) y = Add(x, a) }"
DEEPER = HEAD + " { u = Unsqueeze(t, ones) y = Add(x, u) }"


def feeds() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    return {"t": np.array(7, np.float32), "x": x}


def built(text: str, opset: int = 17) -> ir.Model:
    return model_of(
        text, {k: v for k, v in WEIGHTS.items() if re.search(rf"\b{k}\b", text)}, opset
    )


@pytest.mark.parametrize("text", [UNSQUEEZED, SCALAR, BOTH, DEEPER])
@pytest.mark.parametrize("dims", [(), (1,)])
def test_it_computes_the_same_however_the_input_is_declared(
    text: str, dims: tuple[int, ...]
) -> None:
    model = built(text)
    (wanted,) = run(model, feeds())
    assert apply(LiftScalars(), model).rewrites == {"scalar_input": 1}
    model.graph.inputs[0].shape = ir.Shape(dims)
    (found,) = run(model, feeds() | {"t": np.full(dims, 7, np.float32)})
    np.testing.assert_array_equal(found, wanted)
    leaves(LiftScalars(), model)


def test_an_unsqueeze_becomes_the_reshape() -> None:
    model = built(UNSQUEEZED)
    apply(LiftScalars(), model)
    assert ops(model) == {"Reshape": 1, "Mul": 1, "Add": 1}


def test_axes_as_an_attribute() -> None:
    text = HEAD + " { u = Unsqueeze<axes=[0]>(t) m = Mul(u, f) y = Add(x, m) }"
    model = built(text, opset=11)
    (wanted,) = run(model, feeds())
    apply(LiftScalars(), model)
    assert ops(model) == {"Reshape": 1, "Mul": 1, "Add": 1}
    np.testing.assert_array_equal(run(model, feeds())[0], wanted)


def test_inputs_with_axes_and_unused_ones_stay() -> None:
    leaves(
        LiftScalars(), built("g (float[1] t, float[B,2] x) => (float[B,2] y) { y = Add(x, t) }")
    )
    leaves(LiftScalars(), built("g (float t, float[B,2] x) => (float[B,2] y) { y = Add(x, x) }"))
