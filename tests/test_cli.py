"""What people see: help, errors, reports. Golden texts hold stdout, stderr and exit code together.

``SDOPT_UPDATE_GOLDEN=1 python -m pytest tests/test_cli.py`` writes them anew.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from onnx_ir.passes.common import ShapeInferencePass

from sdopt import modelfile, registry
from sdopt.cli import main
from tests.bench.planted import report as planted
from tests.test_bundle import make_bundle
from tests.test_requirements import block, norms

GOLDEN = Path(__file__).parent / "golden"


class Shell:
    """Calls ``sdopt`` in this process and keeps what it printed."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["sdopt", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def sdopt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


def check_golden(name: str, words: tuple[str, ...], ran: tuple[int, str, str]) -> None:
    code, out, err = ran
    text = f"$ sdopt {' '.join(words)}\nexit {code}\n--- stdout\n{out}--- stderr\n{err}"
    text = re.sub(r"\d+\.\d+ s\b", "0.0 s", re.sub(r"\b[0-9a-f]{16}\b", "<digest>", text))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("SDOPT_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


COMMANDS = [
    "export",
    "adopt",
    "optimize",
    "build",
    "run",
    "bench",
    "eval",
    "compare",
    "precision",
    "inspect",
    "ui",
    "pack",
    "report",
    "sweep",
    "sweep run",
    "sweep best",
    "sweep show",
    "passes",
    "targets",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(sdopt: Shell, command: str) -> None:
    words = (*command.split(), "--help")
    check_golden(f"help_{command.replace(' ', '_')}", words, sdopt(*words))


def test_help_of_all(sdopt: Shell) -> None:
    check_golden("help", ("--help",), sdopt("--help"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown_pass", ("optimize", "b", "--passes", "fuse_qvk,tome=5")),
        ("unknown_preset", ("optimize", "b", "--passes", "clean,@fats")),
        ("unknown_option", ("optimize", "b", "--passes", "cast_fp16:kep=io")),
        ("bad_value", ("optimize", "b", "--passes", "tome=five")),
        ("needs_value", ("optimize", "b", "--passes", "tome")),
        ("wrong_order", ("optimize", "b", "--passes", "cast_fp16,fuse_qkv")),
        ("unreadable_spec", ("optimize", "b", "--passes", "clean,,fuse_qkv")),
        ("no_bundle", ("optimize", "nowhere", "--passes", "clean")),
        ("no_component", ("optimize", "b", "-c", "unnet", "--passes", "clean")),
        ("no_stage", ("optimize", "b", "--from", "optimised", "--passes", "clean")),
        ("no_recipe", ("optimize", "b", "--passes", "mine.recipe")),
        ("requirement", ("optimize", "b", "--passes", "clean", "--require", "attention=most")),
        ("requirement_of_what", ("optimize", "b", "--passes", "clean", "--require", "geglu")),
        ("file_without_output", ("optimize", "some.onnx", "--passes", "clean")),
        ("bundle_with_output", ("optimize", "b", "-o", "x", "--passes", "clean")),
        ("unknown_target", ("build", "b", "--target", "tensort")),
        ("no_cuda", ("build", "b", "--target", "ort", "--provider", "cuda")),
        ("no_source", ("export", "nowhere", "-o", "out")),
        ("no_file", ("adopt", "nowhere.onnx", "-o", "out")),
        ("no_hooks", ("compare", "b", "b", "--hooks", "nowhere.py")),
        ("no_prompt", ("run", "b")),
        ("no_stage_to_bench", ("bench", "b", "--stage", "optimised")),
        ("no_stage_to_report", ("report", "b", "--stage", "optimised")),
        ("nothing_built_to_bench", ("bench", "b", "--target", "trt_rtx:dtype=fp16")),
        ("no_prompts", ("eval", "b", "--prompts", "nowhere.tsv")),
        ("no_password", ("ui", "--host", "0.0.0.0")),
        ("no_password_file", ("ui", "--auth", "me:nowhere")),
        ("no_size", ("ui", "--max-upload", "much")),
        ("no_clip", ("eval", "b", "--prompts", "lines.txt", "--clip", ".")),
    ],
)
def test_errors_say_what_where_why_and_what_to_do(
    sdopt: Shell, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    make_bundle(tmp_path / "b")
    (tmp_path / "lines.txt").write_text("a cat\n")
    code, out, err = sdopt(*words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    check_golden(f"error_{name}", words, (code, out, err))


def test_a_path_that_cannot_be_written_is_an_error_of_the_machine(
    sdopt: Shell, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "b")
    words = ("run", "b", "--prompt", "x", "-o", "b/manifest.json/images")
    code, out, err = sdopt(*words)
    assert code == 1
    check_golden("error_output_under_a_file", words, (code, out, err))


def test_optimize_prints_the_bundle_so_that_verbs_pipe(sdopt: Shell, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    words = ("optimize", "b", "--passes", "clean")
    check_golden("optimize", words, sdopt(*words))
    check_golden("optimize_again", words, sdopt(*words))


def test_a_report_says_what_was_covered_and_a_requirement_decides(
    sdopt: Shell, tmp_path: Path
) -> None:
    norms(tmp_path / "norms.onnx")
    words = ("optimize", "norms.onnx", "-o", "out.onnx", "--passes")
    passes = (*words, "clean,lower_group_norm,fuse_qkv")
    more = (*passes, "--require", "group_norm=2")
    check_golden("optimize_require_met", more, sdopt(*more))
    (tmp_path / "out.onnx").unlink()
    more = (*passes, "--require", "group_norm=all,attention=32")
    check_golden("optimize_require", more, sdopt(*more))
    assert not (tmp_path / "out.onnx").exists()
    code, out, err = sdopt(*more, "--json")
    data = json.loads(out)
    assert (code, data["met"]) == (1, False)
    assert [one["met"] for one in data["requirements"]] == [False, False]
    assert err.startswith("error: group_norm=all and attention=32 are not met")


def test_what_was_there_already_is_told_apart(sdopt: Shell, tmp_path: Path) -> None:
    heads = block("x")
    ShapeInferencePass()(heads)
    modelfile.save(heads, tmp_path / "in.onnx")
    words = ("optimize", "in.onnx", "-o", "out.onnx", "--passes")
    words = (*words, "fuse_qkv,fuse_qkv,flash_attention=ort")
    check_golden("optimize_already", words, sdopt(*words))


def test_the_current_folder_is_the_default(
    sdopt: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    assert sdopt("optimize", "--passes", "clean")[0] == 0
    assert (tmp_path / "b" / "unet" / "optimized.onnx").is_file()


def test_json_is_all_there_is_on_stdout(sdopt: Shell, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    code, out, _ = sdopt("optimize", "b", "--passes", "clean,cast_fp16", "--json")
    report = json.loads(out)
    assert code == 0
    assert [one["spec"] for one in report["components"][0]["passes"]] == ["clean", "cast_fp16"]
    assert report["components"][0]["passes"][0]["ops_before"]["Identity"] == 1


def test_dry_run_writes_nothing(sdopt: Shell, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    assert sdopt("optimize", "b", "--passes", "clean", "--dry-run")[0] == 0
    assert not (tmp_path / "b" / "unet" / "optimized.onnx").exists()


def test_a_recipe_file_holds_the_same_words(sdopt: Shell, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    recipe = tmp_path / "mine.recipe"
    recipe.write_text("# exact first\nclean\ncast_fp16:keep=io,  # then small\n")
    code, out, _ = sdopt("optimize", "b", "--passes", str(recipe), "--json")
    assert code == 0
    specs = [one["spec"] for one in json.loads(out)["components"][0]["passes"]]
    assert specs == ["clean", "cast_fp16:keep=io"]


def test_inspect_shows_stages_and_history(sdopt: Shell, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    sdopt("optimize", "b", "--passes", "clean")
    check_golden("inspect", ("inspect", "b"), sdopt("inspect", "b"))
    data = json.loads(sdopt("inspect", "b", "--json")[1])
    stages = data["components"]["unet"]["stages"]
    assert [stage["name"] for stage in stages] == ["model", "optimized"]
    assert stages[1]["history"] == ["clean"]


def test_a_stage_whose_source_changed_is_called_stale(sdopt: Shell, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    sdopt("optimize", "b", "--passes", "clean")
    sdopt("optimize", "b", "--from", "optimized", "--stage", "half", "--passes", "cast_fp16")
    sdopt("optimize", "b", "--passes", "cast_fp16:keep=io")
    assert "STALE" in sdopt("inspect", "b")[1]


def test_bench_prints_what_it_found(
    sdopt: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdopt import api

    given: dict[str, object] = {}
    monkeypatch.setattr(api, "bench", lambda _, **options: given.update(options) or planted())
    words = ("bench", "b", "--stage", "model", "--stage", "fast")
    check_golden("bench", words, sdopt(*words))
    assert given["stages"] == ["model", "fast"]
    assert given["targets"] == ["ort"]
    assert given["command"] == "sdopt bench b --stage model --stage fast"
    more = (
        "-t",
        "trt",
        "-c",
        "unet",
        "--warmup",
        "2",
        "--dim",
        "tokens=5",
        "-p",
        "a b",
        "--image",
    )
    code, out, err = sdopt(*words, *more, "--json", "--html", "page.html")
    assert (code, err) == (0, "the page is page.html\n")
    assert json.loads(out) == json.loads(json.dumps(planted().to_json()))
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    wanted = {"targets": ["trt"], "components": ["unet"], "warm_up": 2, "dims": {"tokens": 5}}
    wanted |= {"prompts": ["a b"], "images": True, "memory": True}
    assert wanted.items() <= given.items()
    assert sdopt(*words, "--dim", "tokens=1..5")[0] == 2


def test_passes_lists_them_and_shows_a_page(sdopt: Shell) -> None:
    _, out, _ = sdopt("passes")
    assert all(name in out for name in registry.table("passes"))
    check_golden("passes_fuse_qkv", ("passes", "fuse_qkv"), sdopt("passes", "fuse_qkv"))


def test_targets_say_what_is_installed(sdopt: Shell) -> None:
    code, out, _ = sdopt("targets")
    assert code == 0
    assert "onnxruntime" in out


def test_an_interrupt_says_that_nothing_is_lost(
    sdopt: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdopt import api

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "optimize", interrupted)
    code, out, err = sdopt("optimize", str(tmp_path), "--passes", "clean")
    assert (code, out) == (130, "")
    assert "unchanged" in err
