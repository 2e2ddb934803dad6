"""A TensorRT engine as a side; no card is here, so Polygraphy's runner is substituted."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdopt import api, artifacts
from sdopt.bundle import Bundle
from sdopt.compare import compare, compare_layers, polygraphed
from sdopt.errors import BuildError, MissingDependencyError, UsageError
from sdopt.targets.ort import Ort
from tests.runtime import toy


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A toy bundle whose UNet was lowered for TensorRT, with a file where the engine goes."""
    made = toy.bundle(tmp_path / "bundle")
    api.build(made.path, "trt:dtype=fp16", components=["unet"], emit_only=True, shapes="64x64")
    (made.folder("unet") / "made").write_bytes(b"an engine")
    plan = made.folder("unet") / "trt_fp16.plan"
    facts = {"target": "trt:dtype=fp16"}
    artifacts.commit(made.folder("unet") / "made", plan, "key", 1.0, {}, facts)
    return made


class Runner:
    """Polygraphy's ``TrtRunner``, its engine replaced by onnxruntime on the lowered graph."""

    scale = 1.0

    def __init__(self, engine: Any) -> None:
        self._session = Ort().open(Path(engine.path).with_suffix(".onnx"), optimize=False)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to free."""

    def get_input_metadata(self) -> dict[str, SimpleNamespace]:
        ports = self._session.inputs.items()
        return {name: SimpleNamespace(dtype=port.dtype) for name, port in ports}

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, port in self._session.inputs.items():
            assert feeds[name].dtype == port.dtype
        found = self._session.run(feeds)
        return {name: array * np.float16(self.scale) for name, array in found.items()}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> type[Runner]:
    """A machine with TensorRT and a card."""
    import polygraphy.backend.trt as trt

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: SimpleNamespace() if name == "tensorrt" else find(name, *more),
    )
    monkeypatch.setattr(trt, "TrtRunner", Runner)
    monkeypatch.setattr(trt, "EngineFromPath", lambda path: SimpleNamespace(path=path))
    monkeypatch.setattr(Runner, "scale", 1.0)
    return Runner


def plan(bundle: Bundle) -> Path:
    return bundle.folder("unet") / "trt_fp16.plan"


def test_an_engine_is_judged_by_the_passes_of_its_graph(
    bundle: Bundle, card: type[Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = compare(plan(bundle), f"{bundle.path}@model")
    (one,) = good.components
    assert one.verdict == "same"
    assert any(text.startswith("cast_fp16") for text in one.passes)
    assert one.dtypes == ("float16", "float32")
    monkeypatch.setattr(card, "scale", 1.1)
    (bad,) = compare(plan(bundle), f"{bundle.path}@model").components
    assert bad.verdict == "different"
    assert bad.outputs[0].relative_l2 == pytest.approx(0.1, rel=0.05)


def test_the_layers_of_an_engine_are_fused(bundle: Bundle, card: type[Runner]) -> None:
    with pytest.raises(UsageError, match="cannot be looked at"):
        compare_layers(plan(bundle), f"{bundle.path}@model")


def test_without_tensorrt_it_says_what_to_install(bundle: Bundle) -> None:
    with pytest.raises(MissingDependencyError, match="tensorrt"):
        compare(plan(bundle), f"{bundle.path}@model")


def test_polygraphys_own_words(bundle: Bundle) -> None:
    """The real Polygraphy, on a machine without TensorRT."""
    engine = polygraphed._Engine(plan(bundle))
    with pytest.raises(BuildError, match="cannot run this engine here"):
        engine.run({})


def test_an_engine_without_its_graph(bundle: Bundle) -> None:
    plan(bundle).with_suffix(".onnx").unlink()
    with pytest.raises(UsageError, match="built from is not known"):
        compare(plan(bundle), f"{bundle.path}@model")
