"""Tests of the pass ``swap_gelu``."""
# ruff: noqa: D103 - a test's name says what it checks

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from sdopt_swap_gelu.swap_gelu import SwapGelu

from sdopt import graph
from sdopt.errors import SpecError
from sdopt.pipeline import Pipeline, RunContext

LIMITS = {"tanh": 5e-4, "sigmoid": 2.1e-2}


def model(kind: str, shape: str) -> ir.Model:
    return ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 23]>
        g ({kind}[{shape}] x) => ({kind}[{shape}] y) {{
            a = Relu(x)
            b = Gelu(x)
            c = Add(a, b)
            d = Neg(a)
            y = Sub(c, d)
        }}""")


def run(one: ir.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(ReferenceEvaluator(ir.to_proto(one)).run(None, {"x": x})[0])


@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("float16", np.float16)])
@pytest.mark.parametrize(("shape", "size"), [("41", 41), ("N", 333)])
def test_it_moves_no_number_further_than_it_says(
    form: str, kind: str, dtype: type, shape: str, size: int
) -> None:
    one, x = model(kind, shape), np.linspace(-6, 6, size).astype(dtype)
    before = run(one, x).astype(np.float64)
    (report,) = Pipeline.parse(f"swap_gelu={form}").run(one, RunContext())
    assert report.rewrites == {"gelu": 1}
    rounding = 40 * np.finfo(dtype).eps
    moved = np.abs(run(one, x) - before).max()
    assert 0 < moved <= LIMITS[form] + rounding


def test_the_two_graphs() -> None:
    one = model("float", "3")
    Pipeline.parse("swap_gelu=tanh").run(one, RunContext())
    (gelu,) = [node for node in one.graph if node.op_type == "Gelu"]
    assert graph.attribute(gelu, "approximate") == "tanh"
    two = model("float", "3")
    Pipeline.parse("swap_gelu=sigmoid").run(two, RunContext())
    assert graph.op_counts(two) == {
        "Mul": 2, "Relu": 1, "Sigmoid": 1, "Add": 1, "Neg": 1, "Sub": 1
    }  # fmt: skip


@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
def test_a_second_application_changes_nothing(form: str) -> None:
    one, pipeline = model("float", "3"), Pipeline.parse(f"swap_gelu={form}")
    pipeline.run(one, RunContext())
    (report,) = pipeline.run(one, RunContext())
    assert not report.changed


def test_what_it_leaves_alone() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]> g (float[3] x) => (float[3] y) {
        a = Gelu<approximate="tanh">(x)
        y = Erf(a)
    }"""
    one = ir.from_onnx_text(text)
    (report,) = Pipeline.parse("swap_gelu=sigmoid").run(one, RunContext())
    assert not report.changed
    (coverage,) = report.coverage()
    assert (coverage.kind, coverage.found, coverage.present) == ("gelu", 1, 1)


def test_an_input_of_unknown_type_is_left_and_said() -> None:
    one = model("float", "3")
    (gelu,) = [node for node in one.graph if node.op_type == "Gelu"]
    relu = next(iter(one.graph)).outputs[0]
    relu.type = None
    gelu.replace_input_with(0, relu)
    (report,) = Pipeline.parse("swap_gelu=sigmoid").run(one, RunContext())
    assert not report.changed
    (coverage,) = report.coverage()
    assert (coverage.found, coverage.done) == (1, 0)
    assert [skip.reason for skip in coverage.left] == ["the type of its input is not known"]


def test_the_limits_are_those_of_the_functions() -> None:
    x = np.linspace(-8, 8, 20001)
    exact = x * (1 + np.array([math.erf(v / 2**0.5) for v in x])) / 2
    tanh = x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    sigmoid = x / (1 + np.exp(-1.702 * x))
    assert 4e-4 < np.abs(tanh - exact).max() < LIMITS["tanh"]
    assert 2e-2 < np.abs(sigmoid - exact).max() < LIMITS["sigmoid"]


def test_the_text_parses_back() -> None:
    assert str(SwapGelu("tanh")) == "swap_gelu=tanh"
    with pytest.raises(SpecError, match="one of tanh, sigmoid"):
        Pipeline.parse("swap_gelu=relu")
