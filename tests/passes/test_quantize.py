from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from sdopt import graph, modelfile, recorded
from sdopt import weights as weights_module
from sdopt.errors import BundleError, SdoptError, SpecError, UsageError, WeightsError
from sdopt.manifest import Step
from sdopt.passes import _calibration, _quantizing
from sdopt.passes.base import PassContext
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.passes.quantize import Quantize
from sdopt.pipeline import Pipeline, RunContext
from tests.toolkit import apply, leaves, model_of, ops, relative_l2, run

WIDE, MID = 16, 24
NET = """g (float[B,4,H,W] x) => (float[B,4,H,W] y) {
    a = Conv<pads=[1,1,1,1]>(x, k_in)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, k_mid, c_mid)
    t = Transpose<perm=[0,2,3,1]>(c)
    w1t = Transpose<perm=[1,0]>(w1)
    d = MatMul(t, w1t)
    e = Add(d, b1)
    f = Gelu(e)
    h = MatMul(f, w2)
    s = Shape(t)
    l = Flatten<axis=3>(h)
    m = Gemm<transB=1>(l, w3, b3)
    r = Reshape(m, s)
    u = Transpose<perm=[0,3,1,2]>(r)
    v = Add(u, b)
    y = Conv<pads=[1,1,1,1]>(v, k_out)
}"""
"""A first and a last convolution, and between them a layer of each kind."""

BETWEEN = ("k_mid", "w1", "w2", "w3")
OUTPUT_AXIS = {"k_mid": 0, "w1": 0, "w2": 1, "w3": 0}


def net_weights(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "k_in": (WIDE, 4, 3, 3),
        "k_mid": (WIDE, WIDE, 3, 3),
        "c_mid": (WIDE,),
        "w1": (MID, WIDE),
        "b1": (MID,),
        "w2": (MID, WIDE),
        "w3": (WIDE, WIDE),
        "b3": (WIDE,),
        "k_out": (4, WIDE, 3, 3),
    }
    fan = {name: np.sqrt(np.prod(s[1:]) if len(s) != 2 else 20) for name, s in shapes.items()}
    return {n: (rng.standard_normal(s) / fan[n]).astype(dtype) for n, s in shapes.items()}


def net(dtype: type = np.float32, opset: int = 23) -> ir.Model:
    text = NET if dtype == np.float32 else NET.replace("float[", "float16[")
    return model_of(text, net_weights(dtype), opset)


def feeds(batch: int = 2, height: int = 5, width: int = 6, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((batch, 4, height, width), np.float32)}


def record(folder: Path, samples: Sequence[Mapping[str, np.ndarray]]) -> str:
    """A recording as `sdopt record` leaves it."""
    writer = recorded.Writer(folder)
    for index, arrays in enumerate(samples):
        writer.add("unet", arrays, prompt="a", seed=index, step=index, timestep=1.0)
    writer.commit("key", {}, {"unet": recorded.Origin("model", "digest")})
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return record(tmp_path / "recorded", [feeds(seed=seed) for seed in range(4)])


def integers_of(model: ir.Model, name: str) -> tuple[np.ndarray, np.ndarray, ir.Node]:
    """The integers and scales in the place of a weight, and the node that reads them."""
    tensor = model.graph.initializers[f"{name}/integers"]
    (node,) = tensor.consumers()
    scales = node.inputs[1]
    assert scales is not None
    assert tensor.const_value is not None
    assert scales.const_value is not None
    return tensor.const_value.numpy(), scales.const_value.numpy(), node


def dequantized(integers: np.ndarray, scales: np.ndarray, node: ir.Node) -> np.ndarray:
    """What ONNX says that DequantizeLinear makes of them."""
    one = ir.node(
        "DequantizeLinear",
        [
            ir.Value(name="i", shape=ir.Shape(integers.shape), type=ir.TensorType(kind(integers))),
            ir.Value(name="s", shape=ir.Shape(scales.shape), type=ir.TensorType(kind(scales))),
        ],
        {name: attr.value for name, attr in node.attributes.items()},
    )
    one.outputs[0].name, one.outputs[0].type = "w", ir.TensorType(kind(scales))
    inputs = [value for value in one.inputs if value is not None]
    alone = ir.Graph(inputs, one.outputs, nodes=[one], opset_imports={"": 23}, name="g")
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(alone, ir_version=10)))
    return np.asarray(evaluator.run(None, {"i": integers, "s": scales})[0])


def kind(array: np.ndarray) -> ir.DataType:
    return ir.DataType.from_numpy(array.dtype)


@pytest.mark.parametrize(
    ("one", "dequantize", "bound"),
    [(Quantize("w8"), 4, 0.02), (Quantize("w4", block=16), 4, 0.3)],
)
def test_weights_alone(one: Quantize, dequantize: int, bound: float) -> None:
    model = net()
    sizes = (feeds(), feeds(1, 8, 3))
    wanted = [run(model, each)[0] for each in sizes]
    before = ops(model)
    ctx = apply(one, model)
    assert ctx.rewrites == {"conv": 1, "linear": 3}
    assert ops(model) == before | {"DequantizeLinear": dequantize}
    reasons = {skip.reason for skip in ctx.skips}
    assert reasons == {"it alone reads the input x", "it alone makes the output y"}
    assert {"k_in", "k_out"} <= set(model.graph.initializers)
    assert not set(BETWEEN) & set(model.graph.initializers)
    # The transpose of a Linear stays behind the integers, where compilers fold it.
    (turn,) = (n for n in model.graph if n.outputs[0].name == "w1t")
    assert graph.producer(turn.inputs[0], "DequantizeLinear") is not None
    for each, want in zip(sizes, wanted, strict=True):
        assert 1e-4 < relative_l2(run(model, each)[0], want) < bound


def test_every_output_channel_has_its_scale() -> None:
    model, values = net(), net_weights()
    values["w2"][:, 3] *= 100  # one channel that would drown the others if they shared a scale
    values["k_mid"][5] = 0
    for name in BETWEEN:
        model.graph.initializers[name].const_value = ir.tensor(values[name], name=name)
    apply(Quantize("w8"), model)
    for name in BETWEEN:
        integers, scales, node = integers_of(model, name)
        axis = OUTPUT_AXIS[name]
        assert integers.dtype == np.int8
        assert node.attributes["axis"].value == axis
        others = tuple(i for i in range(values[name].ndim) if i != axis)
        largest = np.abs(values[name]).max(axis=others)
        np.testing.assert_allclose(scales, np.where(largest > 0, largest / 127, 1), rtol=1e-6)
        assert np.abs(integers).max() == 127
        wide = scales.reshape([-1 if i == axis else 1 for i in range(values[name].ndim)])
        np.testing.assert_array_equal(integers, np.rint(values[name] / wide))
        assert np.all(np.abs(dequantized(integers, scales, node) - values[name]) <= wide * 0.5001)


def test_four_bits_in_blocks_along_the_inputs() -> None:
    model, values = net(), net_weights()
    apply(Quantize("w4", block=16), model)
    shapes = {"k_mid": (16, 1, 3, 3), "w1": (24, 1), "w2": (2, 16), "w3": (16, 1)}
    for name in BETWEEN:
        integers, scales, node = integers_of(model, name)
        assert integers.dtype == ml_dtypes.int4
        assert scales.shape == shapes[name]
        assert node.attributes["block_size"].value == 16
        assert node.attributes["axis"].value == 1 - OUTPUT_AXIS[name]
        wide = np.abs(integers.astype(np.int8)).max()
        assert wide == 7
        error = np.abs(dequantized(integers, scales, node) - values[name])
        assert error.max() <= scales.max() * 0.5001


def test_the_graph_computes_with_what_the_integers_stand_for() -> None:
    """Bit for bit: a graph whose weights are the dequantized ones gives the same."""
    for one in (Quantize("w8"), Quantize("w4", block=16)):
        model, plain = net(), net()
        apply(one, model)
        for name in BETWEEN:
            array = dequantized(*integers_of(model, name))
            plain.graph.initializers[name].const_value = ir.tensor(array, name=name)
        np.testing.assert_array_equal(run(model, feeds())[0], run(plain, feeds())[0])


@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("calibrate", ["percentile", "minmax"])
def test_int8_with_activations(data: str, activations: str, calibrate: str) -> None:
    model = net()
    before = ops(model)
    sizes = (feeds(), feeds(1, 8, 3, seed=9))
    wanted = [run(model, each)[0] for each in sizes]
    text = f"quantize=int8:data={data}:calibrate={calibrate}:activations={activations}"
    (one,) = Pipeline.parse(text).passes
    ctx = apply(one, model)
    assert ctx.rewrites == {"conv": 1, "linear": 3}
    assert ctx.notes == ["4 activations calibrated on 4 samples"]
    assert ops(model) == before | {"QuantizeLinear": 4, "DequantizeLinear": 8}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            assert graph.producer(node.inputs[0], "DequantizeLinear") is not None
            turn = graph.producer(node.inputs[1], "Transpose")
            weight = turn.inputs[0] if turn is not None else node.inputs[1]
            assert graph.producer(weight, "DequantizeLinear") is not None
    # Nothing but the layers reads the integers: the residual has the value as it was.
    (residual,) = [n for n in model.graph if n.op_type == "Add" and n.outputs[0].name == "v"]
    assert residual.inputs[1] is not None
    assert residual.inputs[1].name == "b"
    zeros = [graph.scalar(n.inputs[2]) for n in model.graph if n.op_type == "QuantizeLinear"]
    assert any(zeros) == (activations == "asymmetric")
    for each, want in zip(sizes, wanted, strict=True):
        assert 1e-4 < relative_l2(run(model, each)[0], want) < 0.05


def test_half_weights_and_the_cast_before() -> None:
    model = net(np.float16)
    x = {"x": feeds()["x"].astype(np.float16)}
    wanted = run(model, x)[0]
    apply(Quantize("w8"), model)
    _, scales, _ = integers_of(model, "w1")
    assert scales.dtype == np.float16
    assert relative_l2(run(model, x)[0], wanted) < 0.02
    pipeline = Pipeline((CastFp16(("io",)), Quantize("w4", block=16)))
    cast = net()
    plain = run(cast, feeds())[0]
    pipeline.run(cast, RunContext())
    assert relative_l2(run(cast, feeds())[0], plain) < 0.3


def test_int8_on_a_graph_in_half_precision(data: str) -> None:
    model = net()
    wanted = run(model, feeds())[0]
    apply(CastFp16(), model)
    apply(Quantize("int8", data), model)
    found = run(model, {"x": feeds()["x"].astype(np.float16)})[0]
    assert found.dtype == np.float16
    assert 1e-4 < relative_l2(found, wanted) < 0.05


@pytest.mark.parametrize("half", [False, True])
def test_fp8_with_activations(data: str, half: bool) -> None:
    """A number of fp8 has three bits behind the first: it is off by a sixteenth at most."""
    model = net()
    wanted = run(model, feeds())[0]
    if half:
        apply(CastFp16(("io",)), model)
    before = ops(model)
    ctx = apply(Quantize("fp8", data), model)
    assert ctx.rewrites == {"conv": 1, "linear": 3}
    assert ops(model) == before | {"QuantizeLinear": 4, "DequantizeLinear": 8}
    for name in BETWEEN:
        numbers, scales, node = integers_of(model, f"{name}.float16" if half else name)
        assert numbers.dtype == ml_dtypes.float8_e4m3fn
        assert np.abs(numbers.astype(np.float32)).max() == 448
        back, plain = dequantized(numbers, scales, node).astype(np.float32), net_weights()[name]
        large = np.abs(plain) > np.abs(plain).max() / 256
        np.testing.assert_allclose(back[large], plain[large], rtol=1 / 16 + 1e-3)
    kinds = {n.outputs[0].dtype for n in model.graph if n.op_type == "QuantizeLinear"}
    assert kinds == {ir.DataType.FLOAT8E4M3FN}
    assert 1e-3 < relative_l2(run(model, feeds())[0], wanted) < 0.1


def test_fp8_has_no_zero_points_and_wants_opset_19(data: str) -> None:
    with pytest.raises(ValueError, match="no zero points"):
        Quantize("fp8", data, activations="asymmetric")
    with pytest.raises(ValueError, match="fp8 is calibrated with recorded data"):
        Quantize("fp8")
    model = net(opset=18)
    ctx = PassContext(model)
    Quantize("fp8", data).apply(model, ctx)
    assert not ctx.rewrites
    reasons = {skip.reason for skip in ctx.skips}
    assert "opset 18 cannot say it, 19 can: raise_ops first" in reasons


def ranges(
    folder: Path, arrays: Sequence[np.ndarray], percentile: float | None, symmetric: bool
) -> tuple[float, float]:
    """The range found for the input of one layer that is fed these."""
    model = model_of(
        "g (float[N] x) => (float[N] y) { z = Add(x, zero)\n y = Identity(z) }",
        {"zero": np.zeros(1, np.float32)},
    )
    record(folder, [{"x": one.astype(np.float32)} for one in arrays])
    opened = recorded.open_recording(folder)
    (value,) = (node.outputs[0] for node in model.graph if node.op_type == "Add")
    (found,) = _calibration.ranges(model, [value], opened, opened.samples, percentile, symmetric)
    return found


def test_min_max_is_over_all_samples_and_holds_zero(tmp_path: Path) -> None:
    arrays = [np.array([1.0, 2.0]), np.array([3.0, 5.0]), np.array([4.0])]
    assert ranges(tmp_path / "a", arrays, None, False) == (0, 5)
    assert ranges(tmp_path / "b", arrays, None, True) == (-5, 5)
    arrays.append(np.array([-7.0]))
    assert ranges(tmp_path / "c", arrays, None, False) == (-7, 5)
    assert ranges(tmp_path / "d", arrays, None, True) == (-7, 7)


def test_percentile_is_that_of_all_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(50_000) for _ in range(4)]
    parts.append(np.array([40.0, -25.0]))  # outliers that min-max would follow
    everything = np.concatenate(parts)
    bins = 40 / _calibration.BINS
    _, high = ranges(tmp_path / "a", parts, 99.0, True)
    assert high == pytest.approx(np.percentile(np.abs(everything), 99), abs=1.5 * bins)
    low, high = ranges(tmp_path / "b", parts, 99.0, False)
    assert low == pytest.approx(np.percentile(everything, 0.5), abs=3 * bins)
    assert high == pytest.approx(np.percentile(everything, 99.5), abs=3 * bins)
    assert ranges(tmp_path / "c", parts, 100.0, True)[1] == pytest.approx(40)
    assert ranges(tmp_path / "d", [np.zeros(3), np.zeros(2)], 99.0, True) == (0, 0)


def test_few_tensors_at_a_time_find_the_same_ranges(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opened = net(), recorded.open_recording(data)
    names = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    values = [names[one] for one in ("b", "t", "f", "l")]
    asked: list[int] = []
    probe = _calibration._Probe.run

    def counted(self: _calibration._Probe, names: Sequence[str], outputs: Any) -> Any:
        asked.append(len(names))
        return probe(self, names, outputs)

    monkeypatch.setattr(_calibration._Probe, "run", counted)
    found = []
    for budget, groups in ((1 << 30, [4]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr(_calibration, "HELD_BYTES", budget)
        asked.clear()
        found.append(_calibration.ranges(model, values, opened, opened.samples, 99.0, True))
        assert asked == [4, *groups]  # first the extremes of all: numbers, made by the graph
    assert found[0] == found[1]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    axis=st.integers(0, 1),
    block=st.sampled_from([0, 2, 4, 16]),
    step=st.sampled_from([4, 64, 1 << 20]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_axis_and_block(
    shape: list[int], axis: int, block: int, step: int, half: bool, seed: int
) -> None:
    """No number moves by more than half a step of its scale, whatever blocks the work goes in."""
    rng = np.random.default_rng(seed)
    dtype = np.float16 if half else np.float32
    array = (rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3)).astype(dtype)
    grid = _quantizing.Grid(ir.DataType.INT4 if block else ir.DataType.INT8, axis, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_quantizing, "_STEP_BYTES", step)
        integers, scales = _quantizing.quantize(ir.tensor(array, name="w"), grid)
        got, by = integers.numpy(), scales.numpy()
    assert tuple(integers.shape.numpy()) == array.shape
    assert by.shape == grid.scale_shape(array.shape)
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    node = ir.node("DequantizeLinear", [], attributes)
    back = dequantized(got, by, node).astype(np.float64)
    wide = dequantized(np.ones_like(got), by, node).astype(np.float64)
    slack = 1e-3 if half else 1e-6
    assert np.all(np.abs(back - array) <= wide * 0.5 + np.abs(array) * slack)


def test_the_file_holds_two_numbers_to_a_byte(tmp_path: Path) -> None:
    """What is streamed to disk is what ONNX Runtime then reads, an odd count of numbers too."""
    array = np.random.default_rng(0).standard_normal((65, 33)).astype(np.float32)
    text = """g (float[B,33] x) => (float[B,65] y) {
        t = Transpose<perm=[1,0]>(w)
        y = MatMul(x, t)
    }"""
    x = {"x": np.eye(33, dtype=np.float32)}
    model = model_of(text, {"w": array})
    apply(Quantize("w4", block=16, ends=True), model)
    wanted = run(model, x)[0]
    before = {
        n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "BLOCK_BYTES", 64)
        modelfile.save(model, tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.onnx_data")
    assert data.stat().st_size < (65 * 33 + 1) // 2 + 64 + 65 * 3 * 4 + 1
    loaded = modelfile.load(tmp_path / "m.onnx")
    for name, value in loaded.graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(str(tmp_path / "m.onnx"), options)
        found = np.asarray(session.run(None, x)[0])
        assert relative_l2(found, wanted) < 1e-2
    assert relative_l2(wanted, array.T) < 0.15


def test_ends_and_keep(data: str) -> None:
    assert apply(Quantize("w8", ends=True), net()).rewrites == {"conv": 3, "linear": 3}
    ctx = apply(Quantize("w8", keep=("Conv", "Gemm", "LayerNorm")), net())
    assert ctx.rewrites == {"linear": 2}
    reasons = [skip.reason for skip in ctx.skips]
    assert "keep=Conv" in reasons
    assert "keep=Gemm" in reasons
    assert "keep=LayerNorm names no layer of this graph" in reasons
    model = net()
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["sdopt.module"] = "blocks.3.attn.to_q"
    ctx = apply(Quantize("int8", data, keep=("blocks.*.attn",)), model)
    assert ctx.rewrites == {"conv": 1, "linear": 1}
    assert {"w1", "w2"} <= set(model.graph.initializers)


def test_many_layers_that_read_an_input_are_no_first_layer() -> None:
    """As the keys and values of 16 cross-attentions read one prompt."""
    text = """g (float[B,16] c, float[B,16] x) => (float[B,16] y) {
        k = MatMul(c, wk)
        v = MatMul(c, wv)
        a = Mul(k, v)
        q = MatMul(x, wq)
        m = Add(q, a)
        y = MatMul(m, wo)
    }"""
    square = {f"w{one}": np.eye(16, dtype=np.float32) for one in "kvqo"}
    ctx = apply(Quantize("w8"), model_of(text, square))
    assert ctx.rewrites == {"linear": 2}
    assert {s.reason for s in ctx.skips} == {
        "it alone reads the input x",
        "it alone makes the output y",
    }


def test_a_value_that_several_layers_read_is_quantized_once(data: str, tmp_path: Path) -> None:
    text = """g (float[B,4] x) => (float[B,16] y) {
        h = MatMul(x, wi)
        n = Relu(h)
        q = MatMul(n, wq)
        k = MatMul(n, wk)
        m = Add(q, k)
        s = Sub(m, n)
        o = Relu(s)
        y = MatMul(o, wo)
    }"""
    rng = np.random.default_rng(0)
    values = {f"w{o}": rng.standard_normal((16, 16)).astype(np.float32) for o in "qko"}
    values["wi"] = rng.standard_normal((4, 16)).astype(np.float32)
    model = model_of(text, values)
    x = [{"x": rng.standard_normal((3, 4)).astype(np.float32)} for _ in range(2)]
    wanted = run(model, x[0])[0]
    apply(Quantize("int8", record(tmp_path / "r", x), calibrate="minmax"), model)
    assert ops(model)["QuantizeLinear"] == 1
    assert relative_l2(run(model, x[0])[0], wanted) < 0.05


def linear(weight: str = "w", extra: str = "") -> str:
    return f"""g (float[B,16] x{extra}) => (float[B,16] y) {{
        y = MatMul(x, {weight})
    }}"""


W16 = np.eye(16, dtype=np.float32)


def test_layers_that_are_left_alone() -> None:
    all_of_it = Quantize("w8", ends=True)
    leaves(
        all_of_it, model_of(linear(extra=", float[16,16] w"), {"w": W16}), "caller may override"
    )
    leaves(
        all_of_it,
        model_of(
            linear().replace("MatMul(x, w)", "MatMul(w, x)").replace("[B,", "[16,"), {"w": W16}
        ),
        "on the left",
    )
    text = "g (float[2,16,16] x) => (float[2,16,16] y) { y = MatMul(x, w) }"
    leaves(all_of_it, model_of(text, {"w": np.stack([W16, W16])}), "has 3 axes")
    text = "g (double[B,16] x) => (double[B,16] y) { y = MatMul(x, w) }"
    leaves(all_of_it, model_of(text, {"w": W16.astype(np.float64)}), "its weight is double")
    text = "g (float[16,B] x) => (float[B,16] y) { y = Gemm<transA=1>(x, w) }"
    leaves(all_of_it, model_of(text, {"w": W16}), "transposed (transA)")
    text = "g (float[B,16] x, float[16,16] w) => (float[B,16] y) { y = MatMul(x, w) }"
    leaves(all_of_it, model_of(text))  # a product of two activations is no layer
    leaves(Quantize("w8"), model_of(linear(), {"w": W16}), "it alone")
    leaves(Quantize("w8"), model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }"))


def test_what_four_bits_cannot_say() -> None:
    one = Quantize("w4", block=16, ends=True)
    leaves(one, model_of(linear(), {"w": W16}, opset=17), "opset 17 cannot say it, 21 can")
    half = linear().replace("float[", "float16[")
    leaves(
        Quantize("w8", ends=True),
        model_of(half, {"w": W16.astype(np.float16)}, opset=17),
        "opset 17 cannot say it, 19 can",
    )
    text = "g (float[B,4,H,W] x) => (float[B,8,H,W] y) { y = Conv(x, w) }"
    model = model_of(text, {"w": np.ones((8, 4, 1, 1), np.float32)})
    leaves(one, model, "only 4 inputs would share a scale")


def test_control_flow_and_shared_weights_are_left() -> None:
    body = """g (bool c, float[2,16] x) => (float[2,16] y) {
        y = If (c) <
            then_branch = t () => (float[2,16] a) { a = MatMul(x, w) },
            else_branch = e () => (float[2,16] b) { b = Neg(x) }
        >
    }"""
    leaves(Quantize("w8", ends=True), model_of(body, {"w": W16}), "body of a control flow")
    text = """g (float[B,16] x) => (float[B,16] y, float[B,16] z) {
        t = Transpose<perm=[1,0]>(w)
        a = MatMul(x, t)
        y = Relu(a)
        n = Relu(x)
        z = MatMul(n, t)
    }"""
    model = model_of(text, {"w": W16})
    next(n for n in model.graph if n.outputs[0].name == "a").metadata_props["sdopt.module"] = "one"
    leaves(Quantize("w8", ends=True, keep=("one",)), model, "shares its weight with a layer")


def test_a_quantized_graph_is_quantized_already() -> None:
    model = net()
    apply(Quantize("w8"), model)
    ctx = apply(Quantize("w4", block=16), model)
    assert ctx.present == {"conv": 1, "linear": 3}
    assert not ctx.rewrites
    with pytest.raises(SdoptError, match="applied to this stage already"):
        Pipeline((Quantize("w8"),)).refuse_repeats([Step("quantize=w4", "lossy")], "here")


def test_data_is_asked_for_and_its_content_decides(tmp_path: Path, data: str) -> None:
    with pytest.raises(SpecError, match="sdopt record BUNDLE"):
        Pipeline.parse("quantize=int8")
    with pytest.raises(BundleError, match="no recorded samples here"):
        Pipeline.parse(f"quantize=int8:data={tmp_path / 'none'}").reads()
    one = Pipeline.parse(f"quantize=int8:data={data}")
    before = one.reads()
    record(Path(data), [feeds(seed=7)])
    assert one.reads() != before
    assert Pipeline.parse("quantize=w8").reads() == []
    for text in ("block=20", "block=8", "percentile=20", "percentile=101", "mode=int4"):
        with pytest.raises(SpecError):
            Pipeline.parse(f"quantize=w4:{text}")
    with pytest.raises(SpecError, match="must come after"):
        Pipeline.parse("quantize=w8,fuse_qkv")


def test_a_recording_that_does_not_fit(tmp_path: Path) -> None:
    other = record(tmp_path / "other", [{"latent_sample": feeds()["x"]}])
    leaves(Quantize("int8", other), net(), "the recording holds unet, and nothing for this graph")
    large = record(tmp_path / "large", [{"x": np.zeros((2, 5, 3, 3), np.float32)}])
    with pytest.raises(UsageError, match=r"recorded x is \[2, 5, 3, 3\]"):
        apply(Quantize("int8", large), net())
    infinite = feeds()
    infinite["x"][0, 0, 0, 0] = np.inf
    broken = record(tmp_path / "broken", [infinite])
    with pytest.raises(UsageError, match="not finite"):
        apply(Quantize("int8", broken), net())
    model = net()
    next(n for n in model.graph if n.op_type == "Gelu").domain = "com.example"
    model.opset_imports["com.example"] = 1
    fine = record(tmp_path / "fine", [feeds()])
    with pytest.raises(UsageError, match="cannot run this graph"):
        apply(Quantize("int8", fine), model)


def test_a_weight_with_nan_is_an_error_when_it_is_written() -> None:
    model = net()
    array = net_weights()["w1"]
    array[0, 0] = np.nan
    model.graph.initializers["w1"].const_value = ir.tensor(array, name="w1")
    Quantize("w8").apply(model, PassContext(model))
    with pytest.raises(WeightsError, match="inf or NaN"):
        integers_of(model, "w1")
