"""adopt: an ONNX file of anyone's through optimize, compare and build; a detector for example."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sdopt import api, modelfile
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, SourceError, UsageError, WeightsError
from tests.detector import Detector
from tests.test_budgets import GIB, LAYERS, python, three_gib  # noqa: F401

GRAPHS = {
    "opset 9, Upsample and norms": Detector(9, norms=True),
    "opset 10": Detector(10, focus=True),
    "opset 11, dynamic": Detector(11, None, focus=True),
    "opset 12": Detector(12, norms=True),
    "opset 17, dynamic": Detector(17, None),
    "opset 22": Detector(22),
}


def saved(detector: Detector, path: Path) -> Path:
    """The detector's file, its weights in another one beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        copy.deepcopy(detector.model),
        path,
        save_as_external_data=True,
        location=f"{path.stem}.data",
        size_threshold=0,
    )
    return path


@pytest.mark.parametrize("name", GRAPHS)
def test_a_detector_is_adopted_optimized_compared_and_built(tmp_path: Path, name: str) -> None:
    old = GRAPHS[name]
    detector = Detector(old.opset, old.size, old.focus, old.norms)
    bundle = str(tmp_path / "bundle")
    path = saved(detector, tmp_path / "theirs" / "yolo.onnx")
    (taken,) = api.adopt(path, bundle).components
    assert taken.nodes == len(detector.model.graph.node)
    report = api.optimize(bundle, "@fast", require=f"silu={detector.silus}")
    assert report.met, report.requirements
    found = api.compare(f"{bundle}@model", f"{bundle}@optimized")
    (model,) = found.components
    assert model.verdict == "same", model
    assert model.allowed is not None
    assert model.allowed < 1e-3
    api.build(bundle, "ort")
    api.build(bundle, "onnx:opset=13")
    for stage in ("ort_cpu", "onnx13"):
        assert api.compare(f"{bundle}@{stage}", f"{bundle}@model").passed
    assert Bundle.open(bundle).stage("model", "model").load().graph.outputs[0].name == "output0"


@pytest.mark.parametrize("opset", [10, 12])
def test_a_detector_of_one_size_becomes_an_engine(tmp_path: Path, opset: int) -> None:
    path = saved(Detector(opset, focus=True), tmp_path / "yolo.onnx")
    api.adopt(path, tmp_path / "bundle")
    api.optimize(tmp_path / "bundle", "@fast")
    (model,) = api.build(tmp_path / "bundle", "trt_rtx:dtype=fp16:sm=86").components
    assert model.artifact["facts"]["profiles"] == [
        {"images": [[1] * 3, [3] * 3, [64] * 3, [96] * 3]}
    ]
    assert model.artifact["size"] > 50_000
    lowered = modelfile.load(Path(model.file))
    weights = [v.const_value for v in modelfile.initializers(lowered)]
    large = [one for one in weights if one is not None and one.size > 64]
    assert {one.dtype for one in large} == {ir.DataType.FLOAT16}


def test_a_dynamic_detector_becomes_an_engine_of_ranges(tmp_path: Path) -> None:
    path = saved(Detector(17, None), tmp_path / "yolo.onnx")
    bundle, target = tmp_path / "bundle", "trt_rtx:dtype=fp16:sm=86"
    api.adopt(path, bundle)
    api.optimize(bundle, "@fast")
    with pytest.raises(UsageError, match="how large the axis 'height' is") as raised:
        api.build(bundle, target)
    assert "--shapes 640x640" in (raised.value.hint or "")
    assert Bundle.open(bundle).stages("model") == ("model", "optimized")
    (model,) = api.build(bundle, target, shapes="64x64..320x480,96x160", batch=(1, 4)).components
    assert [one["images"] for one in model.artifact["facts"]["profiles"]] == [
        [[1, 1, 4], [3, 3, 3], [64, 320, 320], [64, 480, 480]],
        [[1, 1, 4], [3, 3, 3], [96, 96, 96], [160, 160, 160]],
    ]
    assert model.artifact["size"] > 50_000


def test_axes_of_any_name_are_given_by_dim(tmp_path: Path) -> None:
    detector = Detector(17, None)
    path = saved(detector, tmp_path / "yolo.onnx")
    made = onnx.load(path, load_external_data=False)
    dims = made.graph.input[0].type.tensor_type.shape.dim
    dims[0].ClearField("value")
    dims[2].dim_value = -1
    dims[3].dim_param = "columns"
    path.write_bytes(made.SerializeToString())
    bundle = tmp_path / "bundle"
    report = api.adopt(path, bundle)
    assert report.notes == [
        "axis 0 of images had no name and is called images_0",
        "axis 2 of images had no name and is called images_2",
    ]
    assert api.compare(f"{bundle}@model", f"{bundle}@model").passed
    api.build(bundle, "ort")
    with pytest.raises(UsageError, match="how large the axis 'images_0' is"):
        api.build(bundle, "trt_rtx", check=True)
    dims_given = {"images_0": (1, 2), "images_2": (64, 128), "columns": (64, 64)}
    assert api.build(bundle, "trt_rtx", dims=dims_given, check=True).notes


def test_other_compilers_are_given_pixels_too(tmp_path: Path) -> None:
    path = saved(Detector(12, None), tmp_path / "yolo.onnx")
    bundle = tmp_path / "bundle"
    api.adopt(path, bundle)
    (model,) = api.build(
        bundle, "atc:soc=Ascend310P3", shapes="64x96", batch=(1, 1), emit_only=True
    ).components
    (images,) = modelfile.load(Path(model.file)).graph.inputs
    assert images.shape == ir.Shape([1, 3, 64, 96])
    with pytest.raises(UsageError, match="how large the axis 'height' is"):
        api.build(bundle, "atc:soc=Ascend310P3", emit_only=True)


def test_an_unchanged_file_is_up_to_date_and_a_changed_one_is_taken_again(tmp_path: Path) -> None:
    path = saved(Detector(12), tmp_path / "theirs" / "yolo.onnx")
    bundle = tmp_path / "bundle"
    (first,) = api.adopt(path, bundle).components
    assert first.bytes_written > 40_000
    (again,) = api.adopt(path, bundle).components
    assert (again.up_to_date, again.digest) == (True, first.digest)
    assert not api.adopt(path, bundle, force=True).components[0].up_to_date
    api.optimize(bundle, "clean")
    data = path.with_name("yolo.data")
    data.write_bytes(bytes(data.stat().st_size))
    os.utime(data, ns=(1, 1))
    (changed,) = api.adopt(path, bundle).components
    assert not changed.up_to_date
    assert changed.digest != first.digest
    held = Bundle.open(bundle).stage("model", "model").load()
    assert not any(v.const_value.numpy().any() for v in modelfile.initializers(held))  # type: ignore[union-attr]
    stages = api.inspect(bundle)["components"]["model"]["stages"]
    assert [one["stale"] for one in stages] == [False, True]
    for left in path.parent.iterdir():
        left.unlink()
    assert api.optimize(bundle, "clean").components[0].digest


def test_a_bundle_holds_several_graphs_by_name(tmp_path: Path) -> None:
    one = saved(Detector(12), tmp_path / "one.onnx")
    other = saved(Detector(17, None), tmp_path / "other.onnx")
    bundle = tmp_path / "bundle"
    api.adopt(one, bundle, component="boxes")
    api.adopt(other, bundle, component="more.boxes")
    assert Bundle.open(bundle).components == ("boxes", "more.boxes")
    assert api.compare(f"{bundle}@model", f"{bundle}@model").passed
    with pytest.raises(UsageError, match="was adopted from another file"):
        api.adopt(other, bundle, component="boxes")
    with pytest.raises(UsageError, match="is no name for a component"):
        api.adopt(other, bundle, component="../boxes")
    with pytest.raises(UsageError, match="would overwrite the file"):
        api.adopt(bundle / "boxes" / "model.onnx", bundle, component="boxes")
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(BundleError, match="something else than a bundle"):
        api.adopt(one, tmp_path)
    (bundle / "manifest.json").write_text(
        (bundle / "manifest.json").read_text().replace('"adopted"', '"sd1"')
    )
    with pytest.raises(BundleError, match="does not hold adopted graphs"):
        api.adopt(one, bundle)


def test_the_bundle_is_named_after_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(Detector(12), tmp_path / "theirs" / "yolo.onnx")
    monkeypatch.chdir(tmp_path)
    assert api.adopt(path).bundle == "yolo"
    assert (tmp_path / "yolo" / "model" / "model.onnx").is_file()


def test_weights_that_an_old_file_lists_as_inputs_are_none(tmp_path: Path) -> None:
    made = copy.deepcopy(Detector(9).model)
    made.ir_version = 3
    for weight in made.graph.initializer:
        value = helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        made.graph.input.append(value)
    path = tmp_path / "old.onnx"
    onnx.save(made, path)
    report = api.adopt(path, tmp_path / "bundle")
    count = len(made.graph.initializer)
    assert report.notes == [f"{count} weights that were listed as inputs are none now"]
    model = Bundle.open(tmp_path / "bundle").stage("model", "model").load()
    assert [value.name for value in model.graph.inputs] == ["images"]
    api.optimize(tmp_path / "bundle", "@fast")
    assert api.compare(str(tmp_path / "bundle"), f"{tmp_path / 'bundle'}@model").passed


def relu(opset: int) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)


@pytest.mark.parametrize("opset", [7, 8, 26])
def test_other_opsets_are_refused(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "old.onnx"
    path.write_bytes(relu(opset).SerializeToString())
    with pytest.raises(SourceError, match=f"is of opset {opset}") as raised:
        api.adopt(path, tmp_path / "bundle")
    assert "9 to 25" in (raised.value.why or "")
    assert not (tmp_path / "bundle").exists()


def test_a_file_above_2_gib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with open(path, "wb") as file:
        file.truncate(2**31)  # a hole
    with pytest.raises(BundleError, match="larger than 2 GiB") as caught:
        api.adopt(path, tmp_path / "bundle")
    assert "ir_version" in str(caught.value)
    assert "save_as_external_data=True" in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_damaged_files_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path, out = saved(Detector(12), tmp_path / "theirs" / "yolo.onnx"), tmp_path / "bundle"
    data = path.with_name("yolo.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    with pytest.raises(WeightsError, match=r"yolo\.data"):
        api.adopt(path, out)
    data.unlink()
    with pytest.raises(WeightsError, match=r"yolo\.data"):
        api.adopt(path, out)
    data.write_bytes(whole)
    text = path.read_bytes()
    path.write_bytes(text[: len(text) // 2])
    with pytest.raises(BundleError, match="not an ONNX file"):
        api.adopt(path, out)
    with pytest.raises(BundleError, match="no such ONNX file"):
        api.adopt(tmp_path / "nothing.onnx", out)
    (tmp_path / "yolo.data").write_bytes(whole)
    path.write_bytes(text.replace(b"yolo.data", b"../y.data"))
    (tmp_path / "y.data").write_bytes(whole)
    with pytest.raises(WeightsError):
        api.adopt(path, out)
    assert not out.exists()


def test_3_gib_of_weights_are_adopted_under_300_mib(three_gib: Path, tmp_path: Path) -> None:  # noqa: F811
    code = (
        "import json, sys\n"
        "from sdopt import api\n"
        "(one,) = api.adopt(*sys.argv[1:]).components\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "peak = next(int(l.split()[1]) for l in lines if l.startswith('VmHWM')) * 1024\n"
        "print(json.dumps([one.bytes_written, peak]))\n"
    )
    ran = python("-c", code, str(three_gib), str(tmp_path / "bundle"))
    written, peak = json.loads(ran.stdout)
    assert written >= 3 * GIB
    assert peak < 300 << 20
    (data,) = (tmp_path / "bundle" / "model").glob("*.onnx_data")
    assert data.stat().st_blocks * 512 < 1 << 20
    kept = Bundle.open(tmp_path / "bundle").stage("model", "model").load()
    assert len(list(modelfile.initializers(kept))) == LAYERS
