from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api, modelfile, stage_report
from sdopt.bundle import MANIFEST, RAW, Bundle
from sdopt.errors import BundleError, SdoptError, UnknownNameError, UsageError, WeightsError
from sdopt.manifest import RECORD_KEY, ComponentEntry, StageRecord
from tests.toolkit import model_of, run

BODY = """g (float[B,64] x) => (float[B,64] y) {
    i = Identity(x)
    a = MatMul(i, w)
    b = MatMul(a, v)
    y = Relu(b)
}"""


def make_bundle(root: Path, names: tuple[str, ...] = ("unet",)) -> Bundle:
    """A bundle as export leaves it, with one small graph per component."""
    rng = np.random.default_rng(0)
    entries = {name: ComponentEntry(name, "denoiser") for name in names}
    bundle = Bundle.create(root, "toy", "test", entries, by="0")
    with bundle.lock():
        for name in names:
            model = model_of(
                BODY, {k: rng.standard_normal((64, 64)).astype(np.float32) for k in "wv"}
            )
            record = StageRecord(name, "denoiser", RAW, "", "f" * 8, "toy", "test", "float32", "k")
            bundle.commit(model, record)
        bundle.write_manifest()
    return bundle


def outputs(bundle: Bundle, stage: str, dtype: type = np.float32) -> np.ndarray:
    import onnxruntime as ort

    path = bundle.file("unet", stage)
    session = ort.InferenceSession(str(path))
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(dtype)
    return np.asarray(session.run(None, {"x": x})[0])


def test_a_stage_shares_the_weights_it_did_not_change(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    report = api.optimize(tmp_path, "clean")
    assert report.components[0].bytes_written == 0
    assert len(list((tmp_path / "unet").glob("*.onnx_data"))) == 1
    np.testing.assert_array_equal(outputs(bundle, "optimized"), outputs(bundle, RAW))


def test_changed_weights_lie_in_a_file_of_the_stages_own(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, "cast_fp16")
    names = sorted(path.name for path in (tmp_path / "unet").glob("*.onnx_data"))
    assert [name.split("-")[0] for name in names] == ["model", "optimized"]
    found = outputs(bundle, "optimized", np.float16).astype(np.float32)
    np.testing.assert_allclose(found, outputs(bundle, RAW), rtol=0.02, atol=0.2)


def test_the_same_again_is_up_to_date_and_another_recipe_is_not(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    assert not api.optimize(tmp_path, "clean").components[0].up_to_date
    assert api.optimize(tmp_path, "clean").components[0].up_to_date
    assert not api.optimize(tmp_path, "cast_fp16").components[0].up_to_date
    assert not api.optimize(tmp_path, "cast_fp16", force=True).components[0].up_to_date


def test_data_that_no_stage_uses_any_more_is_removed(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    api.optimize(tmp_path, "cast_fp16")
    (before,) = (tmp_path / "unet").glob("optimized-*.onnx_data")
    api.optimize(tmp_path, "cast_fp16:keep=MatMul")
    assert not before.exists()
    api.optimize(tmp_path, "cast_fp16", stage="half")
    assert len(list((tmp_path / "unet").glob("half-*.onnx_data"))) == 1


def test_a_dry_run_reports_and_writes_nothing(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    report = api.optimize(tmp_path, "clean,cast_fp16", dry_run=True)
    assert [one.spec for one in report.components[0].passes] == ["clean", "cast_fp16"]
    assert report.components[0].passes[0].nodes_after == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lost_manifest_is_rebuilt_from_the_stages(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path, ("unet", "vae_decoder")).manifest
    (tmp_path / MANIFEST).unlink()
    assert Bundle.open(tmp_path).manifest.components == manifest.components
    api.optimize(tmp_path, "clean")
    assert json.loads((tmp_path / MANIFEST).read_text())["components"].keys() == {
        "unet",
        "vae_decoder",
    }


def test_a_newer_schema_is_refused_in_manifest_and_stage(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    path = bundle.file("unet", RAW)
    model = modelfile.load(path)
    record = json.loads(model.metadata_props[RECORD_KEY]) | {"schema": 99}
    model.metadata_props[RECORD_KEY] = json.dumps(record)
    modelfile.save(model, path)
    with pytest.raises(BundleError, match="newer sdopt") as caught:
        api.optimize(tmp_path, "clean")
    assert "pip install -U sdopt" in str(caught.value)
    data = json.loads((tmp_path / MANIFEST).read_text()) | {"schema": 99}
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="newer sdopt"):
        Bundle.open(tmp_path)


def test_unknown_fields_of_a_patch_release_are_ignored(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text()) | {"colour": "blue"}
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    assert Bundle.open(tmp_path).components == ("unet",)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": "x"}'])
def test_a_garbled_manifest_is_said(tmp_path: Path, text: str) -> None:
    make_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"cannot be read|newer"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "unet/../../elsewhere"])
def test_a_manifest_that_leaves_the_bundle_is_refused(tmp_path: Path, folder: str) -> None:
    make_bundle(tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["components"]["unet"]["folder"] = folder
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="cannot be read") as caught:
        Bundle.open(tmp_path)
    assert "leaves the bundle" in str(caught.value)


@pytest.mark.parametrize("stage", ["../outside", "a/b", ".hidden", ""])
def test_a_stage_is_named_by_a_plain_word(tmp_path: Path, stage: str) -> None:
    make_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="no name for a stage"):
        api.optimize(tmp_path / "b", "clean", stage=stage)
    assert not (tmp_path / "outside.onnx").exists()


def test_names_that_do_not_exist_are_said_with_those_that_do(tmp_path: Path) -> None:
    make_bundle(tmp_path, ("unet", "vae_decoder"))
    with pytest.raises(UnknownNameError, match="no component 'unett'") as caught:
        api.optimize(tmp_path, "clean", components=["unett"])
    assert "did you mean unet" in str(caught.value)
    with pytest.raises(UnknownNameError, match="no stage 'modell'") as caught:
        api.optimize(tmp_path, "clean", source="modell")
    assert "did you mean model" in str(caught.value)
    with pytest.raises(BundleError, match="no sdopt bundle"):
        api.optimize(tmp_path / "absent", "clean")


def test_the_raw_stage_is_never_overwritten_by_optimize(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    with pytest.raises(UsageError, match="cannot be written by optimize"):
        api.optimize(tmp_path, "clean", stage=RAW)


def test_truncated_weights_are_found_before_anything_is_written(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    (data,) = (tmp_path / "unet").glob("*.onnx_data")
    os.truncate(data, 100)
    with pytest.raises(WeightsError, match="past the end of the weights file"):
        api.optimize(tmp_path, "clean")
    assert not (tmp_path / "unet" / "optimized.onnx").exists()


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    with bundle.lock(), pytest.raises(BundleError, match="another sdopt is writing"):
        api.optimize(tmp_path, "clean")


def test_a_pass_that_runs_once_is_refused_a_second_time(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    stage = bundle.stage("unet", RAW)
    from dataclasses import replace

    from sdopt.manifest import Step

    merged = replace(stage.record, stage="merged", history=(Step("tome=1", "lossy"),))
    with bundle.lock():
        bundle.commit(stage.load(), merged)
    with pytest.raises(SdoptError, match="tome was applied to this stage already"):
        api.optimize(tmp_path, "tome=2", source="merged")


def test_pack_needs_nothing_else(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer").mkdir()
    (tmp_path / "bundle" / "tokenizer" / "vocab.json").write_text("{}")
    api.optimize(bundle.path, "cast_fp16:keep=io")
    wanted = outputs(bundle, "optimized")
    api.pack(bundle.path, tmp_path / "copy")
    for path in sorted((tmp_path / "bundle").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    copy = Bundle.open(tmp_path / "copy")
    np.testing.assert_array_equal(outputs(copy, RAW), wanted)
    assert (tmp_path / "copy" / "tokenizer" / "vocab.json").is_file()
    assert [s.spec for s in copy.stage("unet", RAW).record.history] == ["cast_fp16:keep=io"]
    with pytest.raises(BundleError, match="not empty"):
        api.pack(copy.path, tmp_path / "copy")


def test_one_file_in_one_file_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "someone.onnx"
    model = model_of(BODY, {k: rng.standard_normal((64, 64)).astype(np.float32) for k in "wv"})
    ir.save(model, source)
    out = tmp_path / "elsewhere" / "out.onnx"
    report = api.optimize_file(source, out, "clean")
    assert report.components[0].passes[0].changed
    x = {"x": rng.standard_normal((3, 64)).astype(np.float32)}
    np.testing.assert_array_equal(run(modelfile_in_memory(out), x)[0], run(model, x)[0])
    with pytest.raises(UsageError, match="overwrite its own input"):
        api.optimize_file(source, source, "clean")


def modelfile_in_memory(path: Path) -> ir.Model:
    return ir.external_data.load_to_model(modelfile.load(path))


KILLED = """
import os, sys
from pathlib import Path
from sdopt import api, datafile
calls = 0
def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
os.ftruncate, Path.unlink = dying(os.ftruncate), dying(Path.unlink)
api.optimize(sys.argv[1], "cast_fp16:keep=io")
"""


def test_a_kill_at_any_moment_leaves_the_previous_stage_whole(tmp_path: Path) -> None:
    """Die before each step that touches the disk, the last rename included; then go on.

    A report of the run that is there is whole then, and one of another stage is known for that.
    """
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, "clean")
    wanted = outputs(bundle, "optimized")
    deaths, reports = 0, set()
    for step in range(1, 40):
        api.optimize(tmp_path, "clean", force=True)
        ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(step)], check=False)
        found = outputs(Bundle.open(tmp_path), "optimized")
        np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.2)
        stage = bundle.stage("unet", "optimized")
        kept = stage_report.find(stage.path, stage.digest)
        reports.add((kept.report is not None, kept.stale))
        assert "cannot be used" not in kept.why
        if kept.report is not None:
            told = [one.spec for one in kept.report.component.passes]
            assert told == [one.spec for one in stage.record.history]
        if ran.returncode == 0:
            break
        assert ran.returncode == -signal.SIGKILL
        deaths += 1
    assert deaths >= 6
    assert reports == {(True, False), (False, True), (False, False)}
    api.optimize(tmp_path, "clean", force=True)
    assert [p.name.split("-")[0] for p in (tmp_path / "unet").glob("*.onnx_data")] == ["model"]
    np.testing.assert_array_equal(outputs(Bundle.open(tmp_path), "optimized"), wanted)
