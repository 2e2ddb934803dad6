"""The report kept beside each stage: what it holds, when it is believed, and when it goes away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from sdopt import api, stage_report
from sdopt.bundle import RAW, Bundle
from sdopt.errors import BundleError
from sdopt.report import ComponentReport, PassReport, Report, Skip
from sdopt.stage_report import StageReport, find, path_of
from tests.test_bundle import make_bundle


def optimized(root: Path, passes: str = "clean", **options: object) -> stage_report.Found:
    api.optimize(root, passes, **options)  # type: ignore[arg-type]
    return of(root)


def of(root: Path, stage: str = "optimized", component: str = "unet") -> stage_report.Found:
    one = Bundle.open(root).stage(component, stage)
    return find(one.path, one.digest)


def kept(root: Path) -> list[str]:
    return sorted(str(one.relative_to(root)) for one in root.rglob("*.report.json"))


def test_a_report_survives_the_round_trip() -> None:
    one = PassReport(
        spec="tome=5",
        numerics="lossy",
        seconds=0.25,
        nodes_before=12,
        nodes_after=14,
        ops_before={"Add": 2},
        ops_after={"Add": 3, "com.microsoft::X": 1},
        rewrites={"attention": 1, "no-op removed": 2},
        skips=(Skip("too small", "mid.attn", "attention"), Skip("another input", "up.attn2")),
        notes=("seed 3",),
        new_bytes=7,
        changed=True,
        present={"attention": 1},
        reads=("abc",),
    )
    whole = ComponentReport(
        "unet", "tome5", "tome5.onnx", "d" * 16, 1.5, 14, 7, passes=[one], notes=["n"]
    )
    data = json.loads(json.dumps(whole.to_json()))
    assert ComponentReport.from_json(data) == whole
    assert data["passes"][0]["coverage"][0]["found"] == 3
    assert ComponentReport.from_json({**data, "colour": "blue"}) == whole, "of a later release"
    assert Report("optimize", "b", [whole]).to_json()["components"] == [whole.to_json()]


def test_what_a_run_found_is_kept_beside_its_stage(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    report = api.optimize(tmp_path, "clean,cast_fp16", seed=3)
    found = of(tmp_path).report
    assert found is not None
    assert kept(tmp_path) == ["unet/optimized.report.json"]
    assert found.component.passes == report.components[0].passes
    assert found.component.bytes_written == report.components[0].bytes_written > 0
    assert found.component.seconds == report.components[0].seconds > 0
    assert found.component.file == "optimized.onnx", "a bundle may be moved"
    assert found.command == ("optimize", "BUNDLE", "--passes", "clean,cast_fp16", "--seed", "3")
    assert found.verb == "optimize"
    assert 2**24 < found.peak_rss_bytes < 2**40
    assert "cores" in found.machine
    assert found.written.endswith("+00:00")


def test_the_words_make_the_same_stage_again(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    api.optimize(tmp_path, "clean", stage="first")
    api.optimize(tmp_path, "cast_fp16:keep=io", source="first", stage="half")
    found = of(tmp_path, "half").report
    assert found is not None
    words = [str(tmp_path) if word == stage_report.BUNDLE else word for word in found.command]
    command = [sys.executable, "-m", "sdopt", *words, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (again,) = json.loads(ran.stdout)["components"]
    assert again["up_to_date"]
    assert again["digest"] == found.digest


def test_builds_and_adopted_files_are_told_too(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    api.optimize(bundle.path, "clean")
    api.build(bundle.path, ["ort:threads=2"], batch=(1, 2))
    built = of(bundle.path, "ort_cpu").report
    assert built is not None
    words = ("build", "BUNDLE", "--target", "ort:threads=2", "--batch", "1..2")
    assert (built.verb, built.command) == ("build", words)
    api.build(bundle.path, ["ort"], source=RAW, force=True)
    from_raw = of(bundle.path, "ort_cpu").report
    assert from_raw is not None
    assert from_raw.command[-2:] == ("--from", "model")
    file = bundle.file("unet", RAW)
    api.adopt(file, tmp_path / "a", component="some")
    adopted = of(tmp_path / "a", RAW, "some").report
    assert adopted is not None
    assert adopted.command == ("adopt", str(file), "-o", "BUNDLE", "--component", "some")


def test_an_up_to_date_run_keeps_it_and_force_writes_it_anew(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    optimized(tmp_path)
    path = path_of(tmp_path / "unet" / "optimized.onnx")
    before = path.read_bytes()
    assert api.optimize(tmp_path, "clean").components[0].up_to_date
    assert path.read_bytes() == before
    path.unlink()
    assert optimized(tmp_path).report is None, "the work was not done again"
    assert "no report" in of(tmp_path).why
    assert optimized(tmp_path, force=True).report is not None


def test_a_dry_run_and_a_requirement_that_is_not_met_leave_what_is_there(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    api.optimize(tmp_path, "clean", dry_run=True)
    assert not api.optimize(tmp_path, "clean", require="attention=all").met
    assert kept(tmp_path) == []
    optimized(tmp_path)
    before = path_of(tmp_path / "unet" / "optimized.onnx").read_bytes()
    api.optimize(tmp_path, "cast_fp16", dry_run=True)
    assert not api.optimize(tmp_path, "cast_fp16", require="attention=all").met
    assert path_of(tmp_path / "unet" / "optimized.onnx").read_bytes() == before


def test_a_report_of_what_the_stage_was_is_not_believed(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    optimized(tmp_path)
    path = path_of(tmp_path / "unet" / "optimized.onnx")
    old = path.read_bytes()
    optimized(tmp_path, "cast_fp16")
    path.write_bytes(old)
    found = of(tmp_path)
    assert found.report is None
    assert found.stale
    assert "was before" in found.why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSONDecodeError"),
        ("[]", "no JSON object"),
        ('{"schema": 1}', "KeyError"),
        ('{"schema": 1, "command": [], "component": {}}', "no command"),
        ('{"schema": 99}', "schema is 99"),
        ("\xff", "JSONDecodeError"),
    ],
)
def test_what_cannot_be_read_is_said_and_stops_no_verb(
    tmp_path: Path, text: str, why: str
) -> None:
    make_bundle(tmp_path / "b")
    optimized(tmp_path / "b")
    path = path_of(tmp_path / "b" / "unet" / "optimized.onnx")
    path.write_bytes(text.encode("latin-1"))
    found = of(tmp_path / "b")
    assert found.report is None
    assert why in found.why
    assert api.optimize(tmp_path / "b", "clean").components[0].up_to_date
    api.pack(tmp_path / "b", tmp_path / "copy")
    assert kept(tmp_path / "copy") == []


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    optimized(tmp_path)
    path = path_of(tmp_path / "unet" / "optimized.onnx")
    data = json.loads(path.read_text())
    for change in (
        {"peak_rss_bytes": "much"},
        {"component": {**data["component"], "seconds": "long"}},
        {"component": {**data["component"], "passes": [3]}},
    ):
        with pytest.raises(BundleError, match="cannot be read"):
            StageReport.loads(json.dumps(data | change), "x")


def test_pack_takes_it_along(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    optimized(bundle.path, "clean,cast_fp16")
    before = of(bundle.path).report
    api.pack(bundle.path, tmp_path / "copy")
    after = of(tmp_path / "copy", RAW).report
    assert before is not None
    assert after is not None
    assert kept(tmp_path / "copy") == ["unet/model.report.json"]
    assert after.component.passes == before.component.passes
    assert (after.written, after.machine) == (before.written, before.machine)
    assert after.component.stage == "optimized", "what it was packed from"


def test_it_goes_with_its_stage_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    api.optimize(tmp_path, "clean", stage="gone")
    bundle.file("unet", "gone").unlink()
    theirs = tmp_path / "unet" / "weather.report.json"
    theirs.write_text('{"sky": "blue"}')
    killed = tmp_path / "unet" / ".gone.report.json.tmp0123"
    killed.write_text("{")
    optimized(tmp_path)
    assert kept(tmp_path) == ["unet/optimized.report.json", "unet/weather.report.json"]
    assert not killed.exists()
    stage = bundle.stage("unet", "optimized")
    with bundle.lock():
        bundle.commit(stage.load(), stage.record)
    assert not path_of(stage.path).exists(), "a stage that another tool commits has none"


def test_nothing_takes_it_for_a_stage(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    optimized(tmp_path)
    assert bundle.stages("unet") == ("model", "optimized")
    (tmp_path / "manifest.json").unlink()
    assert Bundle.open(tmp_path).components == ("unet",)
    assert isinstance(bundle.stage("unet", "optimized").load(), ir.Model)
