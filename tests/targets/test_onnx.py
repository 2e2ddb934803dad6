"""onnx: a denoiser in every opset that there is, run and compared with the canonical graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from sdopt import api, registry
from sdopt.cli.app import app
from sdopt.errors import BuildError, SpecError
from sdopt.targets.onnx import NEWEST, OLDEST, Onnx
from sdopt.targets.ort import Ort
from sdopt.tolerance import FP32_REASSOCIATED
from tests import building_bundle
from tests.exporters import tiny
from tests.passes.denoiser import feeds
from tests.toolkit import model_of, relative_l2


def run(path: Path, dtype: type = np.float32) -> np.ndarray:
    session = Ort().open(path, optimize=False)
    given = feeds(dtype, batch=2)
    return session.run(given | {"timestep": np.full(2, 7, dtype)})["out_sample"]


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST + 1))
def test_every_opset_computes_what_the_canonical_graph_does(tmp_path: Path, opset: int) -> None:
    building_bundle.make(tmp_path)
    report = api.build(tmp_path, f"onnx:opset={opset}")
    path = tmp_path / "unet" / f"onnx{opset}.onnx"
    assert report.components[0].file == str(path)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", opset)]
    assert model.ir_version <= onnx.helper.find_min_ir_version_for(model.opset_import)
    assert report.components[0].bytes_written == 0
    wanted = run(tmp_path / "unet" / "model.onnx")
    assert relative_l2(run(path), wanted) <= FP32_REASSOCIATED


@pytest.mark.parametrize("opset", [11, 17, 25])
def test_types_are_cast_both_ways(tmp_path: Path, opset: int) -> None:
    building_bundle.make(tmp_path)
    wanted = run(tmp_path / "unet" / "model.onnx")
    api.build(tmp_path, f"onnx:opset={opset}:dtype=fp16")
    half = run(tmp_path / "unet" / f"onnx{opset}_fp16.onnx", np.float16)
    assert half.dtype == np.float16
    api.optimize(tmp_path, "cast_fp16", stage="half")
    api.build(tmp_path, f"onnx:opset={opset}:dtype=fp32", source="half")
    back = run(tmp_path / "unet" / f"onnx{opset}_fp32.onnx")
    assert back.dtype == np.float32
    assert relative_l2(back, wanted) < relative_l2(half.astype(np.float32), wanted) < 5e-3


def test_what_the_opset_cannot_say_is_refused(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    api.optimize(tmp_path, "cast_bf16", stage="bf16")
    with pytest.raises(BuildError, match="bfloat16"):
        api.build(tmp_path, "onnx:opset=11", source="bf16")
    assert not list(tmp_path.rglob("onnx11.onnx"))
    with pytest.raises(SpecError, match="opset must be 11 to 25, not 26"):
        registry.make("targets", "onnx:opset=26")


def test_another_opset_or_a_custom_domain_is_not_in_the_dialect() -> None:
    relu = "g (float[N] x) => (float[N] y) { y = Relu(x) }"
    Onnx(opset=17).check_legal(_of_time(model_of(relu, opset=17)))
    for opset, reason in ((18, "up to opset 17"), (16, "from opset 17 on")):
        with pytest.raises(BuildError, match=reason):
            Onnx(opset=17).check_legal(_of_time(model_of(relu, opset=opset)))
    other = model_of(relu, opset=17)
    other.graph[0].domain = "com.microsoft"
    with pytest.raises(BuildError, match=r"cannot take com\.microsoft::Relu"):
        Onnx(opset=17).check_legal(_of_time(other))
    late = model_of(relu, opset=17)
    late.ir_version = 10
    with pytest.raises(BuildError, match="up to IR version 8"):
        Onnx(opset=17).check_legal(late)


def _of_time(model):  # type: ignore[no-untyped-def]
    model.ir_version = 8
    return model


def test_export_writes_an_opset_on_the_same_weights(tmp_path: Path) -> None:
    tiny.save(tmp_path / "source", tmp_path / "tokenizer")
    words = ["export", str(tmp_path / "source"), "-o", str(tmp_path / "b"), "--opset", "14"]
    ran = CliRunner().invoke(app, [*words, "-c", "vae_decoder"])
    assert ran.exit_code == 0, ran.output
    folder = tmp_path / "b" / "vae_decoder"
    assert {path.name for path in folder.glob("*.onnx")} == {"model.onnx", "onnx14.onnx"}
    plain = onnx.load(folder / "onnx14.onnx", load_external_data=False)
    assert plain.opset_import[0].version == 14
    given = {"latent_sample": np.ones((1, 4, 3, 5), np.float32)}
    wanted, found = (
        Ort().open(folder / name, optimize=False).run(given)["sample"]
        for name in ("model.onnx", "onnx14.onnx")
    )
    assert relative_l2(found, wanted) <= FP32_REASSOCIATED
    held = sum(path.stat().st_size for path in folder.iterdir() if "data" in path.name)
    assert held < 1.5 * sum(
        path.stat().st_size for path in (tmp_path / "source" / "vae").glob("*.safetensors")
    )
