from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph, modelfile, staging
from sdopt.errors import MissingDependencyError, SdoptError, SpecError
from sdopt.passes.graphsurgeon import Graphsurgeon
from sdopt.pipeline import Pipeline, RunContext
from tests.toolkit import leaves, model_of, ops, run

WIDTH = 512
HERE = "tests.passes.gs_scripts"


def script(name: str) -> Graphsurgeon:
    return Graphsurgeon(f"{HERE}.{name}")


def small(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 30 for name in ("v", "w")
    }
    body = "a = MatMul(x, v)\n b = Relu(a)\n y = MatMul(b, w)"
    model = model_of(f"g (float[2,{WIDTH}] x) => (float[2,{WIDTH}] y) {{ {body} }}", weights)
    for node, module in zip(model.graph, ("up.to_q", "up.act", "up.to_out"), strict=True):
        node.metadata_props[graph.MODULE_KEY] = module
    return model


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    """Two MatMuls and a Relu; both weights lie in a file, as after any save."""
    path = tmp_path / "model.onnx"
    modelfile.save(small(), path)
    return modelfile.load(path)


def weight(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def numbers(model: ir.Model, folder: Path) -> np.ndarray:
    """What a saved and reloaded copy of the model computes."""
    import onnxruntime as ort

    path = folder / "again.onnx"
    modelfile.save(model, path)
    session = ort.InferenceSession(path)
    x = np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def applied(name: str, model: ir.Model) -> dict[str, int]:
    (report,) = Pipeline((script(name),)).run(model, RunContext())
    return report.rewrites


@pytest.mark.parametrize("name", ["nothing", "tidy", "read_everything"])
def test_a_script_that_changes_nothing_leaves_the_graph_and_its_tensors(
    name: str, model: ir.Model
) -> None:
    before = weight(model, "v"), weight(model, "w"), model.graph
    (report,) = Pipeline((script(name),)).run(model, RunContext())
    assert not report.changed
    assert (weight(model, "v"), weight(model, "w"), model.graph) == before


def test_an_operator_is_replaced_and_no_weight_is_read(model: ir.Model, tmp_path: Path) -> None:
    (data,) = tmp_path.glob("*.onnx_data")
    v, w = weight(model, "v"), weight(model, "w")
    kept = data.rename(tmp_path / "hidden")  # reading would fail now
    (report,) = Pipeline((script("relu_to_gelu"),)).run(model, RunContext())
    kept.rename(data)
    assert ops(model) == {"MatMul": 2, "Gelu": 1}
    assert weight(model, "v") is v
    assert weight(model, "w") is w
    assert report.rewrites == {"script applied": 1}
    assert report.notes == ("replaced",)
    assert report.new_bytes == 0
    assert [graph.module_path(node) for node in model.graph] == ["up.to_q", "up.act", "up.to_out"]
    assert all(not node.name for node in model.graph)  # as they came


@pytest.mark.parametrize(("name", "factor"), [("halve_v", 0.5), ("zero_v_in_place", 0.0)])
def test_only_the_weight_that_it_changed_is_written(
    name: str, factor: float, model: ir.Model, tmp_path: Path
) -> None:
    before = numbers(model, tmp_path)
    w = weight(model, "w")
    original = weight(model, "v").numpy().copy()
    (report,) = Pipeline((script(name),)).run(model, RunContext())
    assert weight(model, "w") is w
    assert np.array_equal(weight(model, "v").numpy(), original * np.float32(factor))
    assert report.new_bytes == original.nbytes
    saved = modelfile.save(model, tmp_path / "changed.onnx")
    assert original.nbytes <= saved.bytes_written < 2 * original.nbytes
    assert np.allclose(numbers(model, tmp_path), before * factor, rtol=1e-5)
    again = modelfile.load(tmp_path / "changed.onnx")  # graphsurgeon's own export cannot be
    assert np.array_equal(weight(again, "v").numpy(), original * np.float32(factor))


def test_a_renamed_weight_in_a_copied_graph_stays_in_its_file(
    model: ir.Model, tmp_path: Path
) -> None:
    before = numbers(model, tmp_path)
    v, w = weight(model, "v"), weight(model, "w")
    applied("rename_and_copy", model)
    assert weight(model, "renamed") is v
    assert weight(model, "w") is w
    assert np.array_equal(numbers(model, tmp_path), before)
    assert [graph.module_path(node) for node in model.graph] == ["up.to_q", "up.act", "up.to_out"]


def test_new_nodes_and_weights(model: ir.Model, tmp_path: Path) -> None:
    before = numbers(model, tmp_path)
    applied("add_bias", model)
    assert ops(model) == {"MatMul": 2, "Relu": 1, "Add": 1}
    assert np.allclose(numbers(model, tmp_path), before + np.arange(WIDTH), rtol=1e-4)


def test_the_interface_may_change(model: ir.Model) -> None:
    applied("second_output", model)
    assert [out.name for out in model.graph.outputs] == ["y", "a"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_function", "cannot be imported"),
        ("not_a_function", "is not a function"),
        ("raises", r"KeyError: 'no such layer' \(.*gs_scripts.py:\d+\)"),
        ("garbage", "it returned list"),
        ("unsorted", r"graph.cleanup\(\).toposort\(\)"),
        ("untyped_output", "cannot be exported"),
    ],
)
def test_a_wrong_script_is_named_and_the_model_left(
    name: str, message: str, model: ir.Model
) -> None:
    before = model.graph
    with pytest.raises(SdoptError, match=message) as caught:
        applied(name, model)
    assert f"{HERE}.{name}" in str(caught.value)
    assert caught.value.hint
    assert model.graph is before
    assert ops(model) == {"MatMul": 2, "Relu": 1}


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(SdoptError, match="put the folder of absent_scripts on PYTHONPATH"):
        Pipeline.parse("graphsurgeon=absent_scripts.f").run(small(), RunContext())


@pytest.mark.parametrize("text", ["alone", "a..b", "a.b-c"])
def test_a_value_that_names_no_function(text: str) -> None:
    with pytest.raises(SpecError, match=r"MODULE\.FUNCTION"):
        Pipeline.parse(f"graphsurgeon={text}")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "sdopt\[graphsurgeon\]"'):
        Graphsurgeon("json.dumps").apply(small(), None)  # type: ignore[arg-type]


def test_bodies_capture_weights_and_keep_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"v": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)}
    model = model_of(
        f"""g (float[2,{WIDTH}] x, bool c) => (float[2,{WIDTH}] y) {{
        a = MatMul(x, v)
        y = If(c) <
            then_branch = t () => (float[2,{WIDTH}] p) {{ p = MatMul(a, v) }},
            else_branch = e () => (float[2,{WIDTH}] q) {{ q = Relu(a) }}
        >
    }}""",
        weights,
    )
    feeds = {"x": np.ones((2, WIDTH), np.float32), "c": np.array(True)}
    (before,) = run(model, feeds)
    leaves(script("tidy"), model)
    applied("relu_to_gelu", model)
    assert ops(model) == {"MatMul": 2, "If": 1, "Gelu": 1}
    assert [list(one.initializers) for one in model.graphs()] == [["v"], [], []]
    assert np.array_equal(run(model, feeds)[0], before)


def test_an_input_with_a_default_stays_one() -> None:
    model = small()
    value = model.graph.initializers["v"]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([WIDTH, WIDTH])
    model.graph.inputs.insert(0, value)
    leaves(script("tidy"), model)
    applied("relu_to_gelu", model)
    assert [one.name for one in model.graph.inputs] == ["v", "x"]
    assert set(model.graph.initializers) == {"v", "w"}


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FNUZ])
def test_types_that_numpy_lacks_survive_being_read(dtype: ir.DataType) -> None:
    one = np.ones((WIDTH, WIDTH)).astype(dtype.numpy())
    body = "c = Cast<to=1>(v)\n a = MatMul(x, c)\n b = Relu(a)\n y = Identity(b)"
    model = model_of(f"g (float[2,{WIDTH}] x) => (float[2,{WIDTH}] y) {{ {body} }}", {"v": one})
    before = weight(model, "v")
    applied("read_everything", model)
    assert weight(model, "v") is before
    applied("zero_v_in_place", model)
    assert weight(model, "v").dtype == dtype
    assert not weight(model, "v").numpy().astype(np.float32).any()


def test_an_attribute_that_graphsurgeon_would_drop_is_refused() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { a = Identity(x)\n y = Identity(a) }")
    (first, _) = model.graph
    first.attributes["odd"] = ir.AttrTensors("odd", [ir.tensor(np.ones(2, np.float32))])
    with pytest.raises(SdoptError, match="drop the attribute odd"):
        script("nothing").apply(model, None)  # type: ignore[arg-type]


def test_from_file_to_file(tmp_path: Path) -> None:
    modelfile.save(small(), tmp_path / "in.onnx")
    staging.optimize_file(
        tmp_path / "in.onnx", tmp_path / "o.onnx", f"graphsurgeon={HERE}.halve_v"
    )
    old, new = (weight(modelfile.load(tmp_path / n), "v") for n in ("in.onnx", "o.onnx"))
    assert np.array_equal(new.numpy(), old.numpy() / 2)


def test_an_edited_script_is_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_script.py").write_text("def f(graph): ...\n")
    one = Graphsurgeon("edited_script.f")
    first = one.reads()
    (tmp_path / "edited_script.py").write_text("def f(graph): return graph\n")
    assert one.reads() != first
    assert first[0].startswith("onnx-graphsurgeon ")
