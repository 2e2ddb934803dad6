"""The tiny pipeline and its exports, made once a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from sdopt.exporters import DiffusersSource, Exported
from tests.exporters import tiny
from tests.exporters.made import copy_of

Session = Callable[[str], ort.InferenceSession]
Pair = tuple[Path, Path]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline in fp32."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.save(folder, tmp_path_factory.mktemp("tokenizer") / "files")
    return folder


@pytest.fixture(scope="session")
def pipeline_fp16(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline in fp16."""
    folder = tmp_path_factory.mktemp("half") / "pipeline"
    shutil.copytree(pipeline, folder)
    for path in folder.rglob("*.safetensors"):
        half = path.with_suffix(".half")
        tiny.halve(path, half)
        half.replace(path)
    return folder


@pytest.fixture(scope="session")
def exported(pipeline: Path, lowered: list[bool]) -> Callable[[str], Exported]:
    """Export a component of the tiny pipeline, once; for tests that only look."""
    source = DiffusersSource(pipeline)

    def export(name: str) -> Exported:
        from sdopt.exporters import lowering, trace

        def spy(program: torch.export.ExportedProgram) -> bool:
            lowered.append(lowering.lower(program))
            return lowered[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "lower", spy)
            return source.export(name)

    return _once(export)


@pytest.fixture(scope="session")
def lowered() -> list[bool]:
    """Whether each of the exports that ``exported`` made did without torch's decomposition."""
    return []


@pytest.fixture(scope="session")
def exported_fp16(pipeline_fp16: Path) -> Callable[[str], Exported]:
    """Export a component of the fp16 pipeline, once; for tests that only look."""
    return _once(DiffusersSource(pipeline_fp16).export)


@pytest.fixture(scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The folder of the test file's ``MODEL`` and a bundle of it, which the tests may change."""
    return copy_of(request.module.MODEL, tmp_path_factory)


@pytest.fixture(scope="module")
def source(both: Pair) -> Path:
    """The folder of the test file's ``MODEL``."""
    return both[0]


def _once(export: Callable[[str], Exported]) -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            done[name] = export(name)
        return done[name]

    return get


@pytest.fixture(scope="session")
def session(exported: Callable[[str], Exported]) -> Session:
    """An unoptimised ONNX Runtime session of a component in fp32, made once."""
    done: dict[str, ort.InferenceSession] = {}

    def get(name: str) -> ort.InferenceSession:
        if name not in done:
            done[name] = run(exported(name).model)
        return done[name]

    return get


def inlined(model: ir.Model) -> bytes:
    """The model with its weights inside, as bytes."""
    copy = ir.from_proto(ir.to_proto(model.clone()))
    for name, value in copy.graph.initializers.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
    data: bytes = ir.to_proto(copy).SerializeToString()
    return data


def run(model: ir.Model) -> ort.InferenceSession:
    """An ONNX Runtime session with optimisations off on a copy with its weights inside."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(inlined(model), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may change."""
    shutil.copytree(pipeline, tmp_path / "copy")
    return tmp_path / "copy"


def link_tree(source: Path, target: Path) -> None:
    """Lay ``source`` out as a Hub cache does: files are links into a folder of blobs."""
    blobs = target.parent / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*"):
        if path.is_file():
            blob = blobs / str(abs(hash(path)))
            shutil.copyfile(path, blob)
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
