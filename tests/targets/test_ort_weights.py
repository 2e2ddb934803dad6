"""Initializers that a session takes in place of the file's, large ones and small ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from sdopt import modelfile
from sdopt.errors import UsageError
from sdopt.runtime.scheduled import open_stage
from sdopt.session import Session
from sdopt.targets.ort import Ort
from tests.toolkit import model_of

TEXT = """g (float[n,20] x) => (float[n,40] y) {
    t = Transpose<perm=[1,0]>(big)
    m = MatMul(x, t)
    y = Add(m, bias)
}"""
RNG = np.random.default_rng(0)
BIG, BIAS, X = (
    RNG.standard_normal(shape).astype(np.float32) for shape in ((40, 20), (40,), (3, 20))
)
NEW_BIG, NEW_BIAS = BIG[::-1].copy(), BIAS - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A graph whose larger weight lies beside the file, and the smaller one in it."""
    path = tmp_path / "some" / "graph.onnx"
    path.parent.mkdir()
    modelfile.save(model_of(TEXT, {"big": BIG, "bias": BIAS}), path)
    model = modelfile.load(path)
    kinds = {n: type(v.const_value).__name__ for n, v in model.graph.initializers.items()}
    assert kinds == {"big": "ExternalTensor", "bias": "TensorProtoTensor"}
    return path


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("names", [(), ("big",), ("bias",), ("big", "bias")])
def test_the_session_computes_with_them(
    path: Path, names: tuple[str, ...], optimize: bool
) -> None:
    """Also where onnxruntime transposes the weight while it loads the graph."""
    new = {"big": NEW_BIG, "bias": NEW_BIAS}
    given = {name: ir.tensor(new[name]) for name in names}
    session = Ort(threads=1).open_adapted(path, given, optimize=optimize)
    big, bias = (new[n] if n in names else old for n, old in (("big", BIG), ("bias", BIAS)))
    found = session.run({"x": X})["y"]
    np.testing.assert_allclose(found, X @ big.T + bias, rtol=1e-5, atol=1e-5)


def test_relative_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    session = Ort(threads=1).open_adapted(Path(path.name), {"bias": ir.tensor(NEW_BIAS)})
    np.testing.assert_allclose(session.run({"x": X})["y"], X @ BIG.T + NEW_BIAS, atol=1e-4)


def test_a_name_that_the_graph_does_not_have(path: Path) -> None:
    with pytest.raises(KeyError, match="no initializers other"):
        Ort().open_adapted(path, {"other": ir.tensor(BIAS)})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types(tmp_path: Path, dtype: type) -> None:
    kind = {np.float16: 10, ml_dtypes.bfloat16: 16}[dtype]
    text = "g (float[20] x) => (float[40,20] y) { w = Cast<to=1>(big)\n y = Add(w, x) }"
    model = model_of(text, {"big": BIG.astype(dtype)})
    path = tmp_path / "half.onnx"
    modelfile.save(model, path)
    tensor = ir.tensor(NEW_BIG.astype(dtype))
    assert tensor.dtype == kind
    found = Ort(threads=1).open_adapted(path, {"big": tensor}).run({"x": np.zeros(20, np.float32)})
    np.testing.assert_array_equal(found["y"], NEW_BIG.astype(dtype).astype(np.float32))


class Plain:
    """An opener of somebody's own, which knows of no adapters."""

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        return Ort(threads=1).open(path, optimize=optimize)


def test_an_opener_that_cannot_says_so(path: Path) -> None:
    changed: Mapping[str, Mapping[str, ir.TensorProtocol]] = {"": {"big": ir.tensor(NEW_BIG)}}
    assert open_stage(Plain(), path).inputs.keys() == {"x"}
    with pytest.raises(UsageError, match="cannot change weights"):
        open_stage(Plain(), path, replaced=changed)
