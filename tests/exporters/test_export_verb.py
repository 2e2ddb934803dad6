"""The verb: from a pipeline folder to a bundle, copied or in place, and what can go wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from sdopt import api, stage_report
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, SdoptError, SourceError, StorageError, UsageError

DECODER = ["vae_decoder"]


def decode(bundle: Path, folder: str = "vae_decoder", stem: str = "model") -> np.ndarray:
    session = ort.InferenceSession(str(bundle / folder / f"{stem}.onnx"))
    dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    latent = np.random.default_rng(0).standard_normal((1, 4, 5, 7)).astype(dtype)
    return np.asarray(session.run(None, {"latent_sample": latent})[0])


@pytest.fixture(scope="session")
def exported_bundle(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("verb") / "bundle"
    api.export(pipeline, bundle, components=DECODER)
    return bundle


@pytest.fixture
def bundle(exported_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_has_what_a_pipeline_needs(exported_bundle: Path) -> None:
    files = (path for path in exported_bundle.rglob("*") if path.is_file())
    names = {str(path.relative_to(exported_bundle)) for path in files}
    assert {
        "manifest.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "vae_decoder/config.json",
        "vae_decoder/model.onnx",
    } <= names
    assert Bundle.open(exported_bundle).components == ("vae_decoder",)


def test_the_run_that_exported_is_kept(exported_bundle: Path, pipeline: Path) -> None:
    stage = Bundle.open(exported_bundle).stage("vae_decoder", "model")
    found = stage_report.find(stage.path, stage.digest).report
    assert found is not None
    words = ("export", str(pipeline), "-o", "BUNDLE", "--component", "vae_decoder")
    assert found.command == words
    assert found.component.bytes_written > 0
    assert found.component.seconds > 0


def test_the_weights_are_the_checkpoints_own_bytes(exported_bundle: Path, pipeline: Path) -> None:
    from safetensors.numpy import load_file

    wanted = load_file(pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    model = Bundle.open(exported_bundle).stage("vae_decoder", "model").load()
    seen = 0
    for name, value in model.graph.initializers.items():
        if name in wanted and value.const_value is not None:
            np.testing.assert_array_equal(value.const_value.numpy(), wanted[name])
            seen += 1
    assert seen == sum(name.startswith(("decoder.", "post_quant_conv.")) for name in wanted)


def test_a_second_export_is_up_to_date_and_traces_nothing(
    bundle: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdopt.exporters.diffusers import DiffusersSource

    def never(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(DiffusersSource, "export", never)
    report = api.export(pipeline, bundle, components=DECODER)
    assert report.components[0].up_to_date


def test_components_come_one_by_one(bundle: Path, pipeline: Path) -> None:
    api.export(pipeline, bundle, components=["vae_encoder"])
    assert set(Bundle.open(bundle).components) == {"vae_decoder", "vae_encoder"}


def test_in_place_writes_graphs_and_no_weights(copy: Path, exported_bundle: Path) -> None:
    before = {path for path in copy.rglob("*") if path.is_file()}
    api.export(copy, components=DECODER, in_place=True)
    new = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} - {
        str(p.relative_to(copy)) for p in before
    }
    graph = "vae/vae_decoder.model"
    assert new == {".sdopt.lock", "manifest.json", f"{graph}.onnx", f"{graph}.report.json"}
    wanted = decode(exported_bundle)
    np.testing.assert_array_equal(decode(copy, "vae", "vae_decoder.model"), wanted)
    api.optimize(copy, "clean")
    np.testing.assert_array_equal(decode(copy, "vae", "vae_decoder.optimized"), wanted)
    assert Bundle.open(copy).stages("vae_decoder") == ("model", "optimized")


def test_in_place_cannot_change_the_weights(copy: Path) -> None:
    with pytest.raises(UsageError, match="in-place cannot change the weights to fp16"):
        api.export(copy, components=DECODER, in_place=True, dtype="fp16")


def test_in_place_is_refused_where_weights_are_links(copy: Path, tmp_path: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    blob = tmp_path / "blob"
    weights.rename(blob)
    weights.symlink_to(blob)
    with pytest.raises(SourceError, match="refused in a Hugging Face cache"):
        api.export(copy, components=DECODER, in_place=True)


def test_in_place_takes_no_other_folder(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no other output folder"):
        api.export(copy, tmp_path / "other", in_place=True)


def test_somebody_elses_folder_is_not_written_into(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BundleError, match="not empty and not a bundle"):
        api.export(pipeline, tmp_path, components=DECODER)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_model_does_not_overwrite_a_bundle(bundle: Path, copy: Path) -> None:
    wanted = decode(bundle)
    with pytest.raises(BundleError, match="exported from another source"):
        api.export(copy, bundle, components=DECODER)
    np.testing.assert_array_equal(decode(bundle), wanted)


@pytest.mark.parametrize("damage", ["truncate", "garble", "remove", "pickle"])
def test_a_damaged_checkpoint_is_said_and_the_bundle_stays(
    bundle: Path, copy: Path, damage: str
) -> None:
    """The copy takes the original's place, so that only the damage differs."""
    wanted = decode(bundle)
    source = copy.rename(copy.parent / "pipeline")
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    if damage == "truncate":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "garble":
        with open(weights, "r+b") as file:
            file.write(b"\xff" * 16)
    elif damage == "remove":
        weights.unlink()
    else:
        weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(SdoptError) as caught:
        api.export(source, bundle, components=DECODER)
    assert caught.value.hint
    np.testing.assert_array_equal(decode(bundle), wanted)


def test_a_component_that_is_not_there_is_named(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "vae")
    with pytest.raises(SourceError, match="component vae_decoder is not here") as caught:
        api.export(copy, tmp_path / "out", components=DECODER)
    assert "unet" in (caught.value.hint or "")


def test_a_disk_that_fills_up_leaves_the_previous_export(
    bundle: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = decode(bundle)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sdopt.datafile.os.fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device|could not write") as caught:
        api.export(pipeline, bundle, components=DECODER, dtype="fp16")
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert not [p for p in (bundle / "vae_decoder").iterdir() if "tmp" in p.name]
    np.testing.assert_array_equal(decode(bundle), wanted)


DYING = """
import os, sys
from sdopt import api
replace = os.replace
def die_before_the_graph(source, target):
    if str(target).endswith("model.onnx"):
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = die_before_the_graph
api.export(sys.argv[1], sys.argv[2], components=["vae_decoder"], dtype="fp16")
"""


def test_a_kill_between_the_last_two_renames_leaves_the_previous_export(
    bundle: Path, pipeline: Path
) -> None:
    wanted = decode(bundle)
    ran = subprocess.run([sys.executable, "-c", DYING, pipeline, bundle], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert len(list((bundle / "vae_decoder").glob("*.onnx_data"))) == 2
    np.testing.assert_array_equal(decode(bundle), wanted)
    api.export(pipeline, bundle, components=DECODER, dtype="fp16")
    assert len(list((bundle / "vae_decoder").glob("*.onnx_data"))) == 1
    np.testing.assert_allclose(decode(bundle).astype(np.float32), wanted, rtol=0.1, atol=0.1)
