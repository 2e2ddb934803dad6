"""The programs that the documents' numbers come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file

from benchmarks import companions, images, make_checkpoint, measure, operators
from benchmarks import compile as compiling
from benchmarks.architectures import ARCHITECTURES
from benchmarks.compile_rows import PLANS, Places
from sdopt import api
from sdopt.exporters import DiffusersSource
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.runtime.scheduled import Scheduled, open_stage
from sdopt.targets.ort import Ort
from tests.runtime import toy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint.write_checkpoint(folder, "tiny", "fp16")
    return folder


def test_a_checkpoint_is_a_whole_pipeline(checkpoint: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        "a cat", num_inference_steps=2, height=64, width=64, output_type="np"
    ).images
    assert pictures.shape == (1, 64, 64, 3)
    assert np.isfinite(pictures).all()
    assert pictures.std() > 0.01


def test_weights_depend_on_name_and_seed_only(checkpoint: Path, tmp_path: Path) -> None:
    make_checkpoint.write_checkpoint(tmp_path, "tiny", "fp32", ["vae"])
    name = "vae/diffusion_pytorch_model.safetensors"
    half, single = load_file(checkpoint / name), load_file(tmp_path / name)
    assert half.keys() == single.keys()
    for key, weight in single.items():
        np.testing.assert_array_equal(weight.astype(np.float16), half[key])
    assert not (tmp_path / "unet").exists()


def test_a_weight_larger_than_a_block_is_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = make_checkpoint._draw("a.weight", (50, 7), seed=3)
    monkeypatch.setattr(make_checkpoint, "BLOCK", 64)
    blocks = list(make_checkpoint._draw("a.weight", (50, 7), seed=3))
    assert [block.size for block in blocks] == [64] * 5 + [30]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert abs(whole).max() <= 1 / np.sqrt(7)


def test_measure_tells_the_last_line_and_how_it_ended() -> None:
    good = measure.measure([sys.executable, "-c", "print('a'); print('b')"], 60)
    assert (good.ok, good.message) == (True, "b")
    bad = measure.measure([sys.executable, "-c", "raise ValueError('no')"], 60)
    assert (bad.ok, bad.message) == (False, "ValueError: no")
    slow = measure.measure([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert (slow.ok, slow.message) == (False, "no result after 0 s")
    assert slow.seconds < 30


def test_measure_tells_the_child_apart_from_its_parent_and_siblings() -> None:
    # In a process of its own: see the note on forks in measure().
    code = (
        "import sys\n"
        "from benchmarks.measure import measure\n"
        "for size in (200, 0):\n"
        "    command = [sys.executable, '-c', f'x = b\"x\" * ({size} << 20)']\n"
        "    print(measure(command, 60).peak_bytes >> 20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    large, small = map(int, done.stdout.split())
    assert large >= 200
    assert small < 100


def test_the_table_shows_results_failures_and_refusals() -> None:
    taken = {"seconds": 1.25, "cpu_seconds": 2.0, "peak_bytes": 3e8, "message": ""}
    good = {"nodes": 7, "ops": {"Attention": 2}, "weight_bytes": {"float16": 1.72e9, "int64": 8}}
    report = {
        "command": "python benchmarks/compile.py",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_bytes": 25e9},
        "versions": {"python": "3.11.7"},
        "rows": {
            "a": {**taken, "what": "A", "ok": True, "result": {**good, "refused": None}},
            "b": {**taken, "what": "B", "ok": True, "result": {**good, "refused": "bad | model"}},
            "c": {**taken, "what": "C", "ok": False, "message": "no memory", "result": {}},
        },
    }
    lines = compiling.table(report).splitlines()
    assert lines[2] == "| A | 1.2 | 2.0 | 0.30 | 7 nodes; 2 Attention; 1.72 GB float16 |"
    assert lines[3].endswith("| writes 7 nodes that onnxruntime refuses: bad \\| model |")
    assert lines[4] == "| C | 1.2 | 2.0 | 0.30 | fails: no memory |"
    assert lines[-1].startswith("A CPU, 2 cores, 25 GB; python 3.11.7. `python benchmarks/")


def test_every_row_can_be_asked_for_alone() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "compile.py", "--only", "nothing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 2
    for name in ("export_unet", "optimize", "ort", "onnxsim", "float16"):
        assert name in shown.stderr


def test_every_stage_takes_every_step_in_every_round(tmp_path: Path) -> None:
    bundle = toy.bundle(tmp_path / "bundle")
    api.optimize(bundle.path, "hoist", components=["unet"])
    sessions = {
        stage: open_stage(Ort(threads=1), bundle.file("unet", stage))
        for stage in ("model", "optimized")
    }
    found = companions.measure(sessions, size=8, steps=3, rounds=2)
    assert {name: len(rounds) for name, rounds in found.items()} == {"model": 2, "optimized": 2}
    hoisted = sessions["optimized"]
    assert isinstance(hoisted, Scheduled)
    assert hoisted.calls == {"main": 6, "prompt": 1, "step": 3}


def test_configurations_are_those_of_the_table(checkpoint: Path) -> None:
    for component, part in ARCHITECTURES["tiny"].parts.items():
        config = json.loads((checkpoint / component / "config.json").read_text("utf-8"))
        wanted = json.loads(json.dumps(dict(part.config)))
        assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize("architecture", ["sd21", "sdxl", "sd35-large"])
def test_a_sparse_checkpoint_is_read_by_the_exporter(architecture: str, tmp_path: Path) -> None:
    make_checkpoint.write_checkpoint(tmp_path, architecture, "fp16", sparse=True)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*")) < 10e6
    source = DiffusersSource(tmp_path)
    assert source.component_names() == [
        name
        for part in ARCHITECTURES[architecture].parts
        for name in (("vae_encoder", "vae_decoder") if part == "vae" else (part,))
    ]
    for name in source.component_names():
        assert source.dtype_of(name) == "fp16"


def test_large_files_become_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    make_checkpoint.write_checkpoint(whole, "tiny", "fp16", ["unet"])
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 100_000)
    make_checkpoint.write_checkpoint(split, "tiny", "fp16", ["unet"])
    assert len(list((split / "unet").glob("*-of-*.safetensors"))) > 1
    one, other = (Checkpoint.open(folder / "unet") for folder in (whole, split))
    assert one.entries.keys() == other.entries.keys()
    for name in one.entries:
        assert one.external(name).tobytes() == other.external(name).tobytes()


def test_the_rows_of_an_architecture_run(tmp_path: Path) -> None:
    """Export in place and copying: measured on the tiny model by the program itself."""
    command = [sys.executable, ROOT / "benchmarks" / "compile.py", "-o", tmp_path]
    command += ["--architecture", "tiny", "--only", "export_in_place,export_unet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "tiny" / "compile.json").read_text())["rows"]
    assert [row["ok"] for row in rows.values()] == [True, True]
    assert rows["export_unet"]["result"]["bytes_written"] > 1e5
    assert done.stdout.count("\n| sdopt") == 2


@pytest.mark.parametrize("architecture", PLANS)
def test_rows_start_from_what_another_row_makes(architecture: str, tmp_path: Path) -> None:
    rows = PLANS[architecture].rows(Places(tmp_path, tmp_path / "checkpoint"))
    names = list(rows)
    for index, row in enumerate(rows.values()):
        assert all(name in names[:index] for name in (row.after, row.copies) if name)
        assert row.result not in row.fresh or row.tool or "export" in row.name


@pytest.mark.slow
def test_steps_and_images_are_measured_by_one_command(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"--work {tmp_path} --checkpoint {checkpoint} --target ort --shapes 64x64"
    monkeypatch.setattr(sys, "argv", f"images.py {options} --steps 3 --rounds 2".split())
    images.main()
    (unet,) = json.loads((tmp_path / "steps.json").read_text())["components"]
    assert [row["row"] for row in unet["rows"]] == ["exact", "deep"]
    assert unet["rows"][1]["calls"] == {"main": 2, "shallow": 4}
    found = json.loads((tmp_path / "images.json").read_text())["images"]
    assert [row["row"] for row in found["rows"]] == ["exact"]
    assert "images, seconds each: 64x64 pixels, 3 steps of DDIM" in capsys.readouterr().out


def test_operators_of_token_merging_are_timed_and_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = operators.arrays(2, 64, 8)
    found = {
        name: onnxruntime.InferenceSession(
            operators.model(name, given).SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {key: given[key] for key in inputs if key in given})
        for name, (_, inputs, _, _) in operators.OPERATORS.items()
    }
    best, place = found["TopK of one"]
    np.testing.assert_array_equal(found["ArgMax"][0], place)
    np.testing.assert_array_equal(found["ReduceMax"][0], best)
    summed = found["one-hot product"][0], found["ScatterElements that adds"][0]
    np.testing.assert_allclose(*summed, rtol=1e-5, atol=1e-5)
    options = "--provider cpu --tokens 64 --channels 8 --count 2"
    monkeypatch.setattr(sys, "argv", f"operators.py {options}".split())
    operators.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(operators.OPERATORS)
