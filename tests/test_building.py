"""``build``: artifacts of several targets, whole or not there at all, and only when needed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdopt import api, artifacts
from sdopt.bench.rows import contestants
from sdopt.bundle import Bundle
from sdopt.cli.app import app
from sdopt.errors import (
    BuildError,
    MissingDependencyError,
    SdoptError,
    StorageError,
    UsageError,
)
from sdopt.targets.trt_rtx import TrtRtx
from tests import building_bundle
from tests.test_cli import Shell

RTX = "trt_rtx:dtype=fp16:sm=86"
SIZES = {"shapes": "64x64..128x128", "dims": {"sequence_length": (5, 5)}}


def plans(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.plan"))


def hidden(folder: Path) -> list[Path]:
    """Scratch folders that a build left behind."""
    return [path for path in folder.rglob(".*") if path.is_dir()]


def test_one_command_builds_for_several_targets(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    report = api.build(tmp_path, ["ort", RTX], **SIZES)
    ort, rtx = report.components
    assert (ort.stage, rtx.stage) == ("ort_cpu", "trt_rtx_fp16")
    assert ort.artifact == {}
    plan = tmp_path / "unet" / "trt_rtx_fp16.plan"
    assert rtx.artifact["size"] == plan.stat().st_size
    assert rtx.artifact["digest"] == artifacts.digest_of(plan)
    assert rtx.artifact["facts"]["attentions"] == 1
    assert rtx.artifact["facts"]["profiles"][0]["sample"][2] == [8, 16, 16]
    assert set(rtx.artifact["versions"]) == {"tensorrt-rtx"}


def test_an_engine_is_built_again_only_where_something_changed(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    plan = tmp_path / "unet" / "trt_rtx_fp16.plan"
    first = api.build(tmp_path, RTX, **SIZES).components[0].artifact
    written = plan.stat().st_mtime_ns
    again = api.build(tmp_path, RTX, **SIZES).components[0].artifact
    assert again["up_to_date"] is True
    assert plan.stat().st_mtime_ns == written
    forced = api.build(tmp_path, RTX, force=True, **SIZES).components[0].artifact
    # Where axes are dynamic TensorRT-RTX 1.7 writes its symbols in one of two orders.
    assert (forced["key"], forced["size"]) == (first["key"], first["size"])
    for other in (
        {"shapes": "64x64", "dims": SIZES["dims"]},
        {**SIZES, "batch": (1, 2)},
    ):
        assert api.build(tmp_path, RTX, **other).components[0].artifact["key"] != first["key"]
    other_card = api.build(tmp_path, "trt_rtx:dtype=fp16:sm=89", **SIZES).components[0].artifact
    assert other_card["key"] != first["key"]
    plan.write_bytes(plan.read_bytes()[:-1])
    mended = api.build(tmp_path, RTX, **SIZES).components[0].artifact
    assert mended["key"] == first["key"]
    assert mended["digest"] == artifacts.digest_of(plan)


def test_emit_only_writes_what_another_machine_needs(tmp_path: Path) -> None:
    bundle = building_bundle.make(tmp_path)
    report = api.build(tmp_path, ["trt:dtype=fp16", RTX, "ort"], emit_only=True, **SIZES)
    assert plans(tmp_path) == []
    for stage, program in (("trt_fp16", "trtexec"), ("trt_rtx_fp16", "tensorrt_rtx")):
        script = tmp_path / f"build-{stage}.sh"
        assert script.stat().st_mode & stat.S_IXUSR
        (line,) = [line for line in script.read_text().splitlines() if "--onnx=" in line]
        assert line.startswith(f"{program} --onnx=unet/{stage}.onnx")
        note = (tmp_path / f"build-{stage}.md").read_text()
        listed = [line.strip() for line in note.splitlines() if line.startswith("    ")]
        assert all((tmp_path / name).is_file() for name in listed)
        assert f"unet/{stage}.onnx" in listed
        assert any(name.endswith("_data") for name in listed)
    assert "run them" in (tmp_path / "build-ort_cpu.md").read_text()
    assert len(report.notes) == 3
    assert set(bundle.stages("unet")) >= {"trt_fp16", "trt_rtx_fp16", "ort_cpu"}


def test_an_emitted_script_runs_the_compiler_in_its_own_folder(tmp_path: Path) -> None:
    building_bundle.make(tmp_path / "b")
    api.build(tmp_path / "b", "trt:dtype=fp16", emit_only=True, **SIZES)
    building_bundle.program(
        tmp_path / "bin",
        "trtexec",
        """
        for word in "$@"; do
            case "$word" in
                --onnx=*) test -f "${word#--onnx=}" || exit 3;;
                --saveEngine=*) echo plan > "${word#--saveEngine=}";;
            esac
        done
        """,
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", str(tmp_path / "b" / "build-trt_fp16.sh")], env={"PATH": path}, cwd="/"
    )
    assert done.returncode == 0
    assert plans(tmp_path) == ["trt_fp16.plan"]


def test_check_asks_the_parser_and_compiles_nothing(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    report = api.build(tmp_path, ["trt:dtype=fp16", "ort:provider=cuda"], check=True, **SIZES)
    assert plans(tmp_path) == []
    parsed, in_dialect = report.notes
    assert "unet: tensorrt_rtx 1." in parsed
    assert "parses it" in parsed
    assert in_dialect == "unet: in the dialect of ort"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    report = api.build(tmp_path, RTX, dry_run=True, **SIZES)
    assert sorted(tmp_path.rglob("*")) == before
    assert [each.spec for each in report.components[0].passes][-1] == "flash_attention=trt"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"shapes": "128x128..64x64"}, "above"),
        ({"shapes": "64x60"}, "no size of an image"),
        ({"shapes": "64"}, "is no size"),
        ({"shapes": "64x64,64x64"}, "is there twice"),
        ({"shapes": "64x64"}, "how large the axis 'sequence_length' is"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, given: dict[str, str], reason: str) -> None:
    building_bundle.make(tmp_path)
    if "twice" in reason or "above" in reason or "no size" in reason:
        with pytest.raises(UsageError, match=reason):
            api.build(tmp_path, RTX, dims={"sequence_length": (5, 5)}, **given)
    else:
        # CLIP's 77 tokens are known by that name; another axis is not.
        with pytest.raises(UsageError, match="nothing says how large the axis 'tokens' is"):
            api.build(renamed(tmp_path / "other"), RTX, **given)
    assert plans(tmp_path) == []


def renamed(root: Path) -> Path:
    import onnx

    building_bundle.make(root)
    path = root / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "sequence_length":
                dim.dim_param = "tokens"
    onnx.save(model, path)
    return root


def test_a_missing_compiler_says_what_to_do(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    with pytest.raises(MissingDependencyError, match="the target trt needs tensorrt") as caught:
        api.build(tmp_path, "trt:dtype=fp16", **SIZES)
    assert "pip install" in (caught.value.hint or "")
    assert "--emit-only" in (caught.value.hint or "")


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    api.build(tmp_path, RTX, emit_only=True, **SIZES)
    # A file in the folder's place stops even root, whom permissions do not.
    scratch = tmp_path / "unet" / f".trt_rtx_fp16.plan.scratch-{os.getpid()}"
    scratch.write_text("in the way")
    with pytest.raises(StorageError, match=r"could not write trt_rtx_fp16\.plan"):
        api.build(tmp_path, RTX, **SIZES)
    assert plans(tmp_path) == []


def test_a_full_disk_leaves_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building_bundle.make(tmp_path)

    def full(self: TrtRtx, order: object, made: Path) -> dict[str, object]:
        made.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(made))

    monkeypatch.setattr(TrtRtx, "compile", full)
    with pytest.raises(StorageError, match=r"could not write trt_rtx_fp16\.plan"):
        api.build(tmp_path, RTX, **SIZES)
    assert plans(tmp_path) == []
    assert hidden(tmp_path) == []


def test_a_compiler_that_makes_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building_bundle.make(tmp_path)
    monkeypatch.setattr(TrtRtx, "compile", lambda self, order, made: {})
    with pytest.raises(BuildError, match="ended without an artifact"):
        api.build(tmp_path, RTX, **SIZES)
    assert plans(tmp_path) == []


def test_ctrl_c_cancels_the_builder_and_leaves_nothing(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    assert build_and(signal.SIGINT, tmp_path) == 130
    assert plans(tmp_path) == []
    assert hidden(tmp_path) == []


def test_a_kill_leaves_the_earlier_artifact_and_the_next_build_tidies(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    api.build(tmp_path, RTX, **SIZES)
    plan = tmp_path / "unet" / "trt_rtx_fp16.plan"
    before = plan.read_bytes()
    assert build_and(signal.SIGKILL, tmp_path, "--force") == -signal.SIGKILL
    assert plan.read_bytes() == before
    again = api.build(tmp_path, RTX, **SIZES).components[0].artifact
    assert again["up_to_date"] is True
    assert hidden(tmp_path) == []


def build_and(number: signal.Signals, root: Path, *more: str) -> int:
    """Start a build, send a signal once the compiler has its folder, return the exit status."""
    words = ["build", str(root), "-t", RTX, "--shapes", "64x64..128x128"]
    words += ["--dim", "sequence_length=5..5", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdopt", *words], stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not hidden(root) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the build was over before the signal"
    process.send_signal(number)
    return process.wait(timeout=120)


def test_the_command_prints_what_the_compiler_made(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    words = ["build", str(tmp_path), "-t", "trt_rtx:sm=86", "--fp16", "--shapes", "64x64"]
    ran = CliRunner().invoke(app, [*words, "--dim", "sequence_length=5..5"])
    assert ran.exit_code == 0, ran.output
    assert "unet/trt_rtx_fp16.plan: " in ran.stderr
    assert "0 of 1 attentions fused" in ran.stderr  # heads of 4 have no kernel
    ran = CliRunner().invoke(app, [*words, "--dim", "sequence_length=5..5", "--json"])
    artifact = json.loads(ran.stdout)["components"][0]["artifact"]
    assert artifact["up_to_date"] is True
    ran = CliRunner().invoke(app, [*words, "--bf16"])
    assert isinstance(ran.exception, UsageError)


def test_builds_of_one_target_stand_side_by_side_by_name(tmp_path: Path) -> None:
    building_bundle.make(tmp_path)
    api.optimize(tmp_path, "clean", stage="other")
    api.build(tmp_path, f"{RTX}:stage=plain", source="model", **SIZES)
    (made,) = api.build(tmp_path, f"{RTX}:stage=cleaned", source="other", **SIZES).components
    assert (made.stage, made.artifact["file"]) == ("cleaned", "cleaned.plan")
    bundle = Bundle.open(tmp_path)
    assert {"plain", "cleaned"} < {*bundle.stages("unet")}
    assert bundle.stage("unet", "plain").record.source_stage == "model"
    assert (tmp_path / "unet" / "plain.plan").is_file()
    again = api.build(tmp_path, f"{RTX}:stage=cleaned", source="other", **SIZES).components[0]
    assert again.up_to_date
    assert again.artifact["up_to_date"]
    # A row of bench is a build: the session opens the artifact of that name.
    rows = contestants(bundle, [], [f"{RTX}:stage=plain", f"{RTX}:stage=cleaned"], ["unet"])
    assert [row.label for row in rows] == ["plain", "cleaned"]
    for row in rows:
        artifact = tmp_path / "unet" / f"{row.label}.plan"
        assert artifact.is_file()
        artifact.unlink()
        with pytest.raises(SdoptError) as caught:
            row.open("unet")
        assert str(artifact) in str(caught.value.where)


@pytest.mark.parametrize("name", ["../out", "model", "a b", "optimized", "x-prompt-0123456789ab"])
def test_names_that_a_build_cannot_have(tmp_path: Path, name: str) -> None:
    building_bundle.make(tmp_path)
    api.optimize(tmp_path, "clean")
    before = {path.name for path in (tmp_path / "unet").iterdir()}
    with pytest.raises(UsageError):
        api.build(tmp_path, f'ort:stage="{name}"')
    assert {path.name for path in (tmp_path / "unet").iterdir()} == before


def test_the_command_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    building_bundle.make(tmp_path / "b")
    sdopt = Shell(monkeypatch, capsys)
    code, out, _ = sdopt("build", str(tmp_path / "b"), "--name", "mine")
    assert (code, out) == (0, f"{tmp_path / 'b'}\n")
    assert Bundle.open(tmp_path / "b").stages("unet") == ("model", "mine")
    words = ("build", str(tmp_path / "b"), "--name", "x", "-t", "ort", "-t", "onnx")
    assert "--name is of one target" in sdopt(*words)[2]
