"""lower_ascend: against onnxruntime, and its operators in onnx's reference evaluator."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph
from sdopt.passes.lower_ascend import LowerAscend
from sdopt.passes.lower_opset import LowerOpset
from sdopt.passes.quantize import Quantize
from tests import ascend_ops
from tests.passes.test_quantize import feeds, net, record
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

RNG = np.random.default_rng(0)
TIME = """g (float[B,4] sample, float timestep) => (float[B,4] y) {
    a = Mul(sample, timestep)
    y = Add(a, timestep)
}"""


def test_the_timestep_is_one_whole_number() -> None:
    model, sample = model_of(TIME), RNG.random((2, 4), np.float32)
    (wanted,) = run(model, {"sample": sample, "timestep": np.array(981, np.float32)})
    ctx = apply(LowerAscend(), model)
    timestep = model.graph.inputs[1]
    assert (str(timestep.shape), timestep.dtype) == ("[1]", ir.DataType.INT32)
    assert ctx.rewrites == {"timestep": 1}
    assert [value.name for value in model.graph.inputs] == ["sample", "timestep"]
    (found,) = run(model, {"sample": sample, "timestep": np.array([981], np.int32)})
    assert np.array_equal(found, wanted)
    leaves(LowerAscend(), model)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2,4] sample, float[2] timestep) => (float[2,4] y) { y = Identity(sample) }",
        "g (float[2,4] sample, float sigma) => (float[2,4] y) { y = Mul(sample, sigma) }",
        "g (float[2,4] sample, double timestep) => (float[2,4] y) { y = Identity(sample) }",
    ],
)
def test_other_inputs_stay(text: str) -> None:
    leaves(LowerAscend(), model_of(text))
    leaves(LowerAscend("keep"), model_of(TIME))


SLICES = """g (float[B,3,10] x) => (float[B,3,N] y) {
    b = Slice(x, START, BIG, AXIS)
    a = Slice(x, zero, END, AXIS, one)
    g = Sigmoid(b)
    p = Concat<axis=-1>(g, a)
    y = Identity(p)
}"""


def slices(start: int = 4, end: int = 4, axis: int = 2, big: int = 1 << 62) -> ir.Model:
    numbers = {"START": start, "BIG": big, "AXIS": axis, "END": end, "zero": 0, "one": 1}
    return model_of(SLICES, {name: np.array([number]) for name, number in numbers.items()})


@pytest.mark.parametrize(("start", "axis"), [(4, 2), (-6, -1)])
def test_two_slices_are_one_split(start: int, axis: int) -> None:
    model, x = slices(start=start, axis=axis), RNG.random((2, 3, 10), np.float32)
    (wanted,) = run(model, {"x": x})
    assert apply(LowerAscend(), model).rewrites == {"slice_pair": 1}
    assert ops(model) == {"Split": 1, "Sigmoid": 1, "Concat": 1, "Identity": 1}
    assert np.array_equal(run(model, {"x": x})[0], wanted)


@pytest.mark.parametrize(
    "model",
    [slices(start=5), slices(end=3), slices(big=9), slices(axis=0, start=1, end=1)],
    ids=["a gap", "an overlap", "a rest", "an axis of unknown size"],
)
def test_slices_that_are_no_halves_stay(model: ir.Model) -> None:
    leaves(LowerAscend(), model)


def quantized(body: str, *, dtype: str = "float", point: int = 0) -> ir.Model:
    kind = np.float16 if dtype == "float16" else np.float32
    pool = {
        "s": np.array(0.03, kind),
        "z": np.array(point, np.int8),
        "W": RNG.integers(-127, 128, (6, 8)).astype(np.int8),
        "ws": RNG.uniform(0.01, 0.02, 6).astype(kind),
        "K": RNG.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8),
        "b": RNG.standard_normal(6).astype(kind),
    }
    words = set(re.findall(r"\w+", body))
    used = {key: value for key, value in pool.items() if key in words}
    shape = "[2,4,5,5]" if "Conv" in body else "[2,3,8]" if "MatMul" in body else "[2,8]"
    out = shape.count(",") * "N," + "N"
    return model_of(f"g ({dtype}{shape} x) => ({dtype}[{out}] y) {{ {body} }}", used)


PAIR = "q = QuantizeLinear(x, s, z)\n d = DequantizeLinear(q, s, z)\n"
LAYERS = {
    "MatMul": PAIR
    + "w = DequantizeLinear<axis=0>(W, ws)\n t = Transpose<perm=[1,0]>(w)\n y = MatMul(d, t)",
    "Conv": PAIR + "w = DequantizeLinear<axis=0>(K, ws)\n y = Conv<pads=[1,1,1,1]>(d, w, b)",
    "Gemm": PAIR + "w = DequantizeLinear<axis=0>(W, ws)\n y = Gemm<transB=1>(d, w, b)",
}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_quantized_layer_multiplies_whole_numbers(name: str, dtype: str) -> None:
    model = quantized(LAYERS[name], dtype=dtype)
    shape = [int(dim) for dim in model.graph.inputs[0].shape or () if isinstance(dim, int)]
    x = RNG.standard_normal(shape).astype(np.float16 if dtype == "float16" else np.float32)
    (wanted,) = run(model, {"x": x})
    assert apply(LowerAscend(), model).rewrites == {"quantized": 1}
    assert {"AscendQuant", name, "AscendDequant"} <= ops(model).keys()
    assert not {"QuantizeLinear", "DequantizeLinear"} & ops(model).keys()
    (found,) = ascend_ops.run(model, {"x": x})
    assert found.dtype == wanted.dtype
    assert relative_l2(found, wanted) < (2e-3 if dtype == "float16" else 1e-6)


def test_layers_of_one_input_share_its_quantization() -> None:
    body = LAYERS["MatMul"].replace("y = MatMul(d, t)", "m = MatMul(d, t)\n n = MatMul(d, t)")
    model = quantized(f"{body}\n y = Add(m, n)")
    assert apply(LowerAscend(), model).rewrites == {"quantized": 2}
    assert ops(model)["AscendQuant"] == 1
    assert ops(model)["AscendDequant"] == 2


@pytest.mark.parametrize(
    ("body", "point", "reason"),
    [
        (LAYERS["Gemm"], 3, "zero points"),
        ("w = DequantizeLinear<axis=0>(W, ws)\n y = Gemm<transB=1>(x, w)", 0, "only its weights"),
        (LAYERS["Gemm"].replace("transB=1", "transB=1, alpha=0.5"), 0, "alpha or beta"),
        (LAYERS["Conv"].replace("w = DequantizeLinear<axis=0>(K, ws)\n ", "").replace("w, b", "C"),
         0, "by a pair that is whole"),
    ],
)  # fmt: skip
def test_what_has_no_form_is_left_and_says_why(body: str, point: int, reason: str) -> None:
    model = quantized(body, point=point) if "C)" not in body else _float_conv(body)
    leaves(LowerAscend(), model, reason)
    assert graph.op_counts(model).get("DequantizeLinear")


def _float_conv(body: str) -> ir.Model:
    weights = {
        "s": np.array(0.03, np.float32),
        "z": np.array(0, np.int8),
        "C": RNG.standard_normal((6, 4, 3, 3)).astype(np.float32),
    }
    return model_of(f"g (float[2,4,5,5] x) => (float[2,6,5,5] y) {{ {body} }}", weights)


def test_what_quantize_makes_is_lowered(tmp_path: Path) -> None:
    """A Conv and a Gemm, with the scales that calibration found; two MatMuls have four axes."""
    data = record(tmp_path / "recorded", [feeds(seed=seed) for seed in range(4)])
    model = net()
    apply(Quantize("int8", data=data), model)
    (wanted,) = run(model, feeds(seed=9))
    ctx = apply(LowerAscend(), model)
    assert ctx.rewrites == {"quantized": 2}
    assert ["second of four axes" in skip.reason for skip in ctx.skips] == [True, True]
    assert ops(model)["QuantizeLinear"] == ops(model)["AscendQuant"] == 2
    apply(LowerOpset(19), model)  # onnx has no older DequantizeLinear to evaluate
    (found,) = ascend_ops.run(model, feeds(seed=9))
    # A sum that is rounded otherwise may fall on the other side of an integer of the next layer.
    assert relative_l2(found, wanted) < 2e-3


def test_no_weight_or_scale_is_read() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    model = quantized(LAYERS["Conv"])
    for name in ("K", "ws"):
        value = model.graph.initializers[name]
        held = value.const_value
        assert held is not None
        value.type, value.shape = ir.TensorType(held.dtype), ir.Shape(held.shape.numpy())
        value.const_value = ir.LazyTensor(
            read, dtype=held.dtype, shape=ir.Shape(held.shape.numpy()), name=name
        )
    assert apply(LowerAscend(), model).rewrites == {"quantized": 1}
