from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
import pytest

from sdopt import graph, modelfile
from sdopt.errors import MissingDependencyError, SdoptError
from sdopt.passes.base import PassContext
from sdopt.passes.simplify import Simplify
from sdopt.pipeline import Pipeline, RunContext
from tests.toolkit import leaves, model_of, ops, relative_l2, run


def applied(model: ir.Model) -> ir.Model:
    Pipeline((Simplify(),)).run(model, RunContext())
    return model


def shape_arithmetic(width: int, dtype: str = "float") -> ir.Model:
    """Reshape to a shape computed from constants, an Identity, and two weights."""
    kind = np.dtype({"float": "f4", "float16": "f2"}[dtype])
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        name: (rng.standard_normal((width, width)) / width**0.5).astype(kind)
        for name in ("v", "w")
    }
    weights |= {"two": np.array([2]), "half": np.array([width // 2])}
    return model_of(
        f"""g ({dtype}[B,{width}] x) => ({dtype}[B,{width}] y) {{
        a = MatMul(x, v)
        minus = Constant<value_ints=[-1]>()
        s = Concat<axis=0>(minus, two, half)
        r = Reshape(a, s)
        i = Identity(r)
        z = Constant<value_ints=[-1]>()
        full = Mul(two, half)
        t = Concat<axis=0>(z, full)
        f = Reshape(i, t)
        e = Relu(f)
        y = MatMul(e, w)
    }}""",
        weights,
    )


@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize(("dtype", "limit"), [("float", 5e-6), ("float16", 5e-3)])
def test_constants_fold_and_weights_are_the_same_tensors(
    width: int, dtype: str, limit: float
) -> None:
    model = shape_arithmetic(width, dtype)
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    feeds = {"x": np.random.default_rng(1).standard_normal((3, width)).astype(kind)}
    (before,) = run(model, feeds)
    held = {name: model.graph.initializers[name].const_value for name in ("v", "w")}
    (report,) = Pipeline((Simplify(),)).run(model, RunContext())
    assert report.changed
    assert not {"Constant", "Concat", "Identity", "Mul"} & set(ops(model))
    assert {name: model.graph.initializers[name].const_value for name in held} == held
    assert relative_l2(run(model, feeds)[0], before) <= limit
    assert str(model.graph.inputs[0].shape) == f"[B,{width}]"
    leaves(Simplify(), model)


def test_files_are_not_even_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    modelfile.save(shape_arithmetic(96), path)
    model = modelfile.load(path)
    (data,) = tmp_path.glob("*.onnx_data")
    data.unlink()
    held = model.graph.initializers["v"].const_value
    applied(model)
    assert isinstance(held, ir.ExternalTensor)
    assert model.graph.initializers["v"].const_value is held


def test_nodes_that_stay_keep_their_module_path() -> None:
    model = shape_arithmetic(32)
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props[graph.MODULE_KEY] = f"block.{node.inputs[1].name}"
    applied(model)
    paths = [graph.module_path(node) for node in model.graph if node.op_type == "MatMul"]
    assert paths == ["block.v", "block.w"]


def test_nothing_to_do() -> None:
    leaves(Simplify(), model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }"))


def test_a_weight_that_nothing_reads_any_more_goes() -> None:
    model = model_of(
        "g (float[2,64] x) => (float[2,64] y) { d = MatMul(x, w)\n y = Relu(x) }",
        {"w": np.ones((64, 64), np.float32)},
    )
    applied(model)
    assert ops(model) == {"Relu": 1}
    assert not model.graph.initializers


def test_an_input_with_a_default_is_no_constant() -> None:
    model = model_of("g (float[2] x, float[1] k) => (float[2] y) { n = Neg(k)\n y = Mul(x, n) }")
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(np.ones(1, np.float32), name="k")
    model.graph.register_initializer(value)
    applied(model)
    assert [one.name for one in model.graph.inputs] == ["x", "k"]
    assert list(model.graph.initializers) == ["k"]
    x = np.ones(2, np.float32)
    assert run(model, {"x": x, "k": np.full(1, 3, np.float32)})[0].tolist() == [-3, -3]
    assert run(model, {"x": x})[0].tolist() == [-1, -1]


def test_weights_inside_bodies() -> None:
    width = 64
    model = model_of(
        f"""g (float[2,{width}] x, bool c) => (float[2,{width}] y) {{
        y = If(c) <
            then_branch = t () => (float[2,{width}] p) {{ p = MatMul(x, v) }},
            else_branch = e () => (float[2,{width}] q) {{ q = Relu(x) }}
        >
    }}""",
        {"v": np.eye(width, dtype=np.float32) * 2},
    )
    outer = model.graph
    then = next(iter(outer)).attributes["then_branch"].as_graph()
    value = outer.initializers.pop("v")
    then.register_initializer(value)
    held = value.const_value
    feeds = {"x": np.ones((2, width), np.float32), "c": np.array(True)}
    before = run(model, feeds)
    applied(model)
    assert np.array_equal(run(model, feeds)[0], before[0])
    (weight,) = [v.const_value for v in modelfile.initializers(model)]
    assert weight is held


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    model = shape_arithmetic(32)
    with pytest.raises(MissingDependencyError, match=r'pip install "sdopt\[simplify\]"'):
        Simplify().apply(model, PassContext(model))


def test_what_onnxsim_refuses_is_said() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Relu(x, x) }")
    with pytest.raises(SdoptError, match="onnxsim failed") as caught:
        Simplify().apply(model, PassContext(model))
    assert caught.value.why


def test_the_version_of_onnxsim_decides_the_result() -> None:
    (version,) = Simplify().reads()
    assert version.startswith("onnxsim ")


def test_another_order_of_constants_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def reordered(proto: onnx.ModelProto, **_: object) -> tuple[onnx.ModelProto, bool]:
        result = onnx.ModelProto()
        result.CopyFrom(proto)
        del result.graph.node[:]
        result.graph.node.extend([proto.graph.node[1], proto.graph.node[0], proto.graph.node[2]])
        return result, True

    monkeypatch.setattr(onnxsim, "simplify", reordered)
    model = model_of("""g (float[2] x) => (float[2] y) {
        a = Constant<value_floats=[1.0, 2.0]>()
        b = Constant<value_floats=[3.0, 4.0]>()
        y = Sum(x, a, b)
    }""")
    leaves(Simplify(), model)
