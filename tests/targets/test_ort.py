from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from sdopt import registry, spec, wellformed
from sdopt.errors import BuildError, MissingDependencyError, SpecError, UsageError
from sdopt.pipeline import Pipeline, RunContext
from sdopt.targets.base import Dialect
from sdopt.targets.ort import Ort
from tests.toolkit import model_of

BODY = """g (float[B,3] x, int64[B] i) => (float[B,3] y) {
    r = Unsqueeze(i, one)
    f = Cast<to=1>(r)
    y = Mul(x, f)
}"""
CONSTANTS: Mapping[str, np.ndarray] = {"one": np.array([1])}


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(model, path)
    return path


@pytest.mark.parametrize("text", ["ort", "ort:threads=2"])
def test_options_go_round(text: str) -> None:
    target = registry.make("targets", text)
    assert isinstance(target, Ort)
    assert str(target) == text
    assert target.name() == "ort"
    assert target.stage_name() == "ort_cpu"
    assert set(target.versions()) == {"onnxruntime"}


def test_cuda_needs_another_onnxruntime() -> None:
    target = registry.make("targets", "ort:provider=cuda")
    assert target.stage_name() == "ort_cuda"
    with pytest.raises(MissingDependencyError) as caught:
        target.check_available()
    assert "pip install onnxruntime-gpu" in str(caught.value)
    assert "--emit-only" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["ort:device=1", "ort:search=heuristic", "ort:provider=cuda:threads=2", "ort:device=-1"],
)
def test_options_of_the_other_provider_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        registry.make("targets", text)


@pytest.mark.parametrize("text", ["ort:provider=tpu", "ort:threads=-1", "ort:threads=many"])
def test_wrong_options(text: str) -> None:
    with pytest.raises(SpecError):
        registry.make("targets", text)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError) as caught:
        Ort().open(tmp_path / "model.onnx")
    assert 'pip install "sdopt[ort]"' in str(caught.value)


def test_what_it_wants_is_a_pipeline_of_ours() -> None:
    passes = Pipeline.parse(Ort().wants).passes
    assert [one.name() for one in passes] == ["clean", "lower_group_norm", "flash_attention"]


@pytest.mark.parametrize("name", sorted(registry.table("targets")))
def test_every_target_has_a_dialect_and_a_lowering_that_parses(name: str) -> None:
    target = spec.bind(registry.resolve("targets", name), spec.parse(name)[0])
    assert isinstance(target.dialect, Dialect)
    assert Pipeline.parse(target.wants).passes


def test_a_graph_in_the_dialect() -> None:
    Ort().check_legal(model_of(BODY, CONSTANTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.opset_imports.update({"": 27}), "up to opset 26"),
        (lambda m: setattr(m, "ir_version", 14), "IR version 13"),
        (lambda m: setattr(m.graph[2], "domain", "their.domain"), "the domain 'their.domain'"),
        (lambda m: _rename(m.graph[2], "com.microsoft", "GroupNorm"), "no CPU kernel"),
    ],
)
def test_a_graph_that_is_not(change: object, message: str) -> None:
    model = model_of(BODY, CONSTANTS)
    model.graph[2].metadata_props["sdopt.module"] = "mid_block.attentions.0"
    change(model)  # type: ignore[operator]
    with pytest.raises(BuildError) as caught:
        Ort().check_legal(model)
    assert message in str(caught.value)
    if "domain" in message or "kernel" in message:
        assert "mid_block.attentions.0" in str(caught.value)


@pytest.mark.parametrize("opset", [17, 23])
def test_a_version_that_is_too_new_is_lowered_as_the_error_says(opset: int) -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset)
    model.ir_version = 14
    with pytest.raises(BuildError) as caught:
        Ort().check_legal(model)
    passes = str(caught.value.hint).rpartition("--passes ")[2]
    assert passes == f"lower_opset={opset}"
    Pipeline.parse(passes).run(model, RunContext())
    Ort().check_legal(model)


@pytest.mark.parametrize(("version", "opset"), [(8, 18), (7, 14), (11, 23)])
def test_the_latest_opset_of_a_version(version: int, opset: int) -> None:
    assert wellformed.opset_of_version(version, 26) == opset


def _rename(node: ir.Node, domain: str, op_type: str) -> None:
    node.domain, node.op_type = domain, op_type


def test_functions_of_the_model_are_legal() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23, "mine" : 1]>
        g (float[B] x) => (float[B] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 23]> twice (a) => (b) { b = Add(a, a) }"""
    Ort().check_legal(ir.from_onnx_text(text))


@pytest.mark.parametrize("optimize", [True, False])
def test_a_session(tmp_path: Path, optimize: bool) -> None:
    session = Ort(threads=1).open(saved(model_of(BODY, CONSTANTS), tmp_path), optimize=optimize)
    assert list(session.inputs) == ["x", "i"]
    assert session.inputs["x"].dtype == np.float32
    assert session.inputs["x"].dims == ("B", 3)
    assert session.outputs["y"].dims == ("B", 3)
    x = np.arange(6, dtype=np.float64).reshape(3, 2).T  # float64, and no C order
    out = session.run({"i": np.array([2, 3]), "x": x})
    np.testing.assert_array_equal(out["y"], x * [[2], [3]])
    assert out["y"].dtype == np.float32


def test_scalars_keep_their_rank(tmp_path: Path) -> None:
    body = "g (float x) => (float y) { y = Neg(x) }"
    session = Ort().open(saved(model_of(body), tmp_path))
    assert session.run({"x": np.array(2.0)})["y"].shape == ()


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, "the graph takes x, i, not x"),
        ({"x": np.zeros((2, 4)), "i": np.zeros(2, np.int64)}, r"is \[B, 3\].*given \[2, 4\]"),
        ({"x": np.zeros(3), "i": np.zeros(2, np.int64)}, r"was given \[3\]"),
        ({"x": np.zeros((2, 3)), "i": np.zeros(2)}, "holds int64, and was given float64"),
    ],
)
def test_feeds_that_do_not_fit(tmp_path: Path, feeds: dict[str, np.ndarray], message: str) -> None:
    session = Ort().open(saved(model_of(BODY, CONSTANTS), tmp_path))
    with pytest.raises(UsageError, match=message):
        session.run(feeds)


def test_a_failure_inside_the_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = Ort().open(saved(model_of(BODY, CONSTANTS), tmp_path))
    with pytest.raises(BuildError, match="failed in this graph"):
        session.run({"x": np.zeros((2, 3)), "i": np.zeros(3, np.int64)})
    assert capfd.readouterr().err == ""


def test_files_that_do_not_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(BuildError, match="cannot load"):
        Ort().open(path)
    path.write_bytes(b"no graph")
    with pytest.raises(BuildError, match="cannot load"):
        Ort().open(path)
    half = BODY.replace("float[", "bfloat16[").replace("to=1", "to=16")
    with pytest.raises(BuildError) as caught:
        Ort().open(saved(model_of(half, CONSTANTS), tmp_path))
    assert "--dtype fp16" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_version_is_that_of_the_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With onnxruntime-gpu alone the module is there and its usual package is not."""
    known = {"onnxruntime-gpu": "1.31.1"}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]}
    )
    assert Ort().versions() == known


@pytest.mark.parametrize(
    ("message", "captures"),
    [
        ("This session cannot use the graph capture feature as requested by the user", True),
        ("out of memory", None),
    ],
)
def test_a_graph_with_nodes_on_the_host_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, message: str, captures: bool | None
) -> None:
    """What onnxruntime 1.31 said of SD1.5's text encoder on an H100."""
    from onnxruntime.capi import onnxruntime_pybind11_state as raised

    from sdopt.targets import _ort_cuda_session as cuda

    asked: list[str] = []
    plain = onnxruntime.InferenceSession

    def opened(model: str, options: onnxruntime.SessionOptions, **more: object) -> object:
        ((_, given),) = more["providers"]  # type: ignore[misc, attr-defined]
        asked.append(given["enable_cuda_graph"])
        if given["enable_cuda_graph"] == "1":
            raise raised.Fail(message)
        return plain(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    path = saved(model_of(BODY, CONSTANTS), tmp_path)
    if captures is None:
        with pytest.raises(BuildError, match="cannot load"):
            cuda.OrtCudaSession(path)
        assert asked == ["1"]
        return
    session = cuda.OrtCudaSession(path)
    assert asked == ["1", "0"]
    assert not session.captures
