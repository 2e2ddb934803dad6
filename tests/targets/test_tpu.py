"""tpu: bmodels made by Sophgo's compiler and run on its simulator, beside what ORT computes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import psutil
import pytest

from sdopt import api, artifacts, graph, modelfile, recorded, registry
from sdopt.errors import (
    BuildError,
    BundleError,
    MissingDependencyError,
    SpecError,
    StorageError,
    UsageError,
)
from sdopt.passes.base import Role
from sdopt.shapes import Request, parse_sizes
from sdopt.targets._tpu_request import write_samples
from sdopt.targets.base import Order
from sdopt.targets.ort import Ort
from sdopt.targets.tpu import Tpu
from sdopt.tolerance import FP32_REASSOCIATED
from tests.exporters.made import copy_of_digits
from tests.toolkit import Arrays, model_of, relative_l2

ROOT = Path(__file__).parent.parent.parent
SIZES = "64x64,72x88"
"""The second is a latent of 9x11: each of the three halvings rounds, in both directions."""
SINGLE = "tpu:guidance=false"
"""Half the batch, so half the time on the simulator."""
FOLDER = Path("bmodel/bm1684x_fp16")

PYTHON = Path(os.environ.get("SDOPT_TPU_PYTHON") or ROOT / ".venv-tpu/bin/python")
with_compiler = pytest.mark.skipif(
    not PYTHON.is_file(), reason="tpu_mlir is not installed here: make tpu-env"
)

pytestmark = pytest.mark.timeout(900)
"""The first test to ask exports the model, the next one compiles it."""

COSINE = 0.999


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDOPT_TPU_PYTHON", str(PYTHON))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model, optimized; single precision, as a compiler of it wants."""
    return copy_of_digits(tmp_path_factory)


@pytest.fixture(scope="module")
def built(bundle: Path) -> Path:
    """The same with bmodels of two sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDOPT_TPU_PYTHON", str(PYTHON))
        names = ["text_encoder", "unet", "vae_decoder"]
        api.build(bundle, SINGLE, components=names, shapes=SIZES)
    return bundle


def feeds(size: str, component: str) -> Arrays:
    height, width = (int(side) // 8 for side in size.split("x"))
    rng = np.random.default_rng([height, width])
    latent = rng.standard_normal((1, 4, height, width)).astype(np.float32)
    context = rng.standard_normal((1, 77, 96)).astype(np.float32)
    return {
        "text_encoder": {"input_ids": rng.integers(0, 592, (1, 77))},
        "unet": {
            "sample": latent,
            "timestep": np.array(501, np.float32),
            "encoder_hidden_states": context,
        },
        "vae_decoder": {"latent_sample": latent},
    }[component]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def order(path: Path, shapes: str = "64x64", batch: tuple[int, int] = (1, 1)) -> Order:
    sizes = parse_sizes(shapes)
    inputs: dict[str, list[int | str]] = {
        "sample": ["batch_size", 4, "height", "width"],
        "timestep": [],
    }
    profiles = Request(sizes, batch).profiles(inputs, doubled=True)
    return Order("unet", Role.DENOISER, path, profiles, sizes, batch, lambda *_: None, "sd1")


def small(
    folder: Path, body: str = "y = Add(sample, timestep)", weights: Arrays | None = None
) -> Path:
    """A denoiser's inputs around a few nodes, saved."""
    head = "g (float[batch_size,4,height,width] sample, float timestep) => (float[a,b,c,d] y)"
    model = model_of(f"{head} {{ {body} }}", weights, opset=17)
    model.ir_version = 8
    (folder / "unet").mkdir(parents=True)
    path = folder / "unet/tpu.onnx"
    ir.save(model, path)
    return path


# What the compiler makes, run by the vendor's simulator.


@with_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "size"),
    [
        ("unet", "64x64"),
        ("unet", "72x88"),
        ("vae_decoder", "72x88"),
        ("text_encoder", "64x64"),
    ],
)
def test_the_simulator_computes_what_ort_does(built: Path, component: str, size: str) -> None:
    simulated = Tpu(guidance=False).open(built / component / "tpu.onnx")
    reference = Ort().open(built / component / "model.onnx", optimize=False)
    given = feeds(size, component)
    found, wanted = simulated.run(given), reference.run(given)
    assert list(found) == list(wanted)
    for name, value in found.items():
        assert value.shape == wanted[name].shape
        assert value.dtype == wanted[name].dtype
        assert cosine(value, wanted[name]) >= COSINE


@with_compiler
@pytest.mark.slow
def test_names_layout_and_types_are_those_of_sophgos_pipelines(built: Path) -> None:
    names = ["sdv15_text", "sdv15_unet_multisize", "sdv15_vd_multisize"]
    files = sorted(path.name for path in (built / FOLDER).iterdir())
    assert files == sorted(f"{name}.bmodel{end}" for name in names for end in ("", ".json"))
    types = {}
    for name in names:
        facts = json.loads((built / FOLDER / f"{name}.bmodel.json").read_text())["facts"]
        types[facts["network"]] = facts["quantize"]
    assert types == {"sdv15_te": "F32", "sdv15_unet": "F16", "sdv15_vd": "BF16"}
    made = artifacts.recorded(built / FOLDER / "sdv15_unet_multisize.bmodel")
    assert made is not None
    # The largest first: the other order makes zeros of the smaller sizes.
    assert [one["sample"] for one in made.facts["sizes"]] == [[1, 4, 9, 11], [1, 4, 8, 8]]
    assert str(built) not in json.dumps(made.facts)


@with_compiler
@pytest.mark.slow
def test_a_bmodel_can_be_compared(built: Path) -> None:
    path = built / FOLDER / "sdv15_text.bmodel"
    found = api.compare(str(path), f"{built}@optimized")
    (one,) = found.components
    assert (one.component, one.verdict, one.allowed) == ("text_encoder", "same", FP32_REASSOCIATED)


@with_compiler
@pytest.mark.slow
def test_a_size_that_was_not_compiled(built: Path) -> None:
    session = Tpu(guidance=False).open(built / FOLDER / "sdv15_unet_multisize.bmodel")
    assert session.inputs["sample"].dims == (1, 4, "height", "width")
    given = feeds("64x64", "unet") | {"sample": np.zeros((1, 4, 8, 9), np.float32)}
    with pytest.raises(UsageError, match=r"not compiled for sample \[1, 4, 8, 9\]"):
        session.run(given)


@with_compiler
@pytest.mark.slow
def test_a_build_is_skipped_only_where_nothing_differs(built: Path) -> None:
    def build(target: str, shapes: str = SIZES) -> dict[str, object]:
        report = api.build(built, target, components=["text_encoder"], shapes=shapes)
        return report.components[0].artifact

    path = built / FOLDER / "sdv15_text.bmodel"
    first = json.loads((built / FOLDER / "sdv15_text.bmodel.json").read_text())
    before = path.read_bytes()
    same = build(f'{SINGLE}:python="{PYTHON}"')
    assert same["up_to_date"]
    # A prompt is as long at every size, so other sizes are the same text encoder.
    assert build(SINGLE, "128x128")["up_to_date"]
    other = build("tpu:guidance=false:chip=bm1688")
    assert "up_to_date" not in other
    assert other["key"] != same["key"]
    info = (built / "bmodel/bm1688_fp16/sdv15_text.bmodel").read_bytes()
    assert b"BM1688" in info
    path.write_bytes(before[:-1])
    again = build(SINGLE)
    assert "up_to_date" not in again
    assert again["key"] == first["key"] == same["key"]
    # The compiler writes the time into the file, and is otherwise deterministic.
    stamp = rb"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}"
    assert re.search(stamp, before)
    assert re.sub(stamp, b"", path.read_bytes()) == re.sub(stamp, b"", before)


@contextlib.contextmanager
def killing(word: str) -> Iterator[list[str]]:
    """Kills the first process below this one whose command line holds ``word``."""
    done = threading.Event()
    killed: list[str] = []

    def watch() -> None:
        while not done.is_set() and not killed:
            for child in psutil.Process().children(recursive=True):
                try:
                    line = child.cmdline()
                    if any(word in part for part in line) and "-c" not in line:
                        child.send_signal(signal.SIGKILL)
                        killed.append(word)
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


@with_compiler
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["model_deploy.py", "tpuc-opt"])
def test_a_compiler_that_dies_half_way_leaves_nothing(bundle: Path, victim: str) -> None:
    folder = bundle / "bmodel/cv186x_fp16"
    ended = {"model_deploy.py": "was killed by SIGKILL", "tpuc-opt": "ended with 1"}[victim]
    with killing(victim) as killed, pytest.raises(BuildError, match=f"Sophgo's model_.* {ended}"):
        api.build(bundle, "tpu:chip=cv186x", components=["text_encoder"], shapes="64x64")
    assert killed
    assert list(folder.iterdir()) == []
    time.sleep(0.2)
    assert not [
        child for child in psutil.Process().children(recursive=True) if "tpu" in child.name()
    ]


@with_compiler
def test_the_frontend_judges_a_graph(tmp_path: Path) -> None:
    (note,) = Tpu().check(order(small(tmp_path / "good", "y = Mul(sample, sample)")))
    assert "takes it" in note
    refused = small(tmp_path / "bad", "s = Det(sample) y = Mul(sample, s)")
    with pytest.raises(BuildError, match="Sophgo's model_transform ended with 1") as caught:
        Tpu().check(order(refused))
    assert "Det" in str(caught.value)


# What is asked of no compiler.


def test_the_lowered_graph_computes_the_same_and_has_no_computed_resize(bundle: Path) -> None:
    api.build(bundle, "tpu", shapes=SIZES, emit_only=True)
    for component in ("unet", "vae_decoder", "text_encoder"):
        path = bundle / component / "tpu.onnx"
        model = modelfile.load(path)
        assert (graph.opset(model), model.ir_version <= 9) == (17, True)
        given = feeds("72x88", component)
        found = Ort().open(path, optimize=False).run(given)
        wanted = Ort().open(path.with_name("model.onnx"), optimize=False).run(given)
        for name, value in found.items():
            assert relative_l2(value, wanted[name]) <= FP32_REASSOCIATED
        for node in graph.nodes(model):
            assert node.op_type != "Resize" or len(node.inputs) == 3


def test_what_is_emitted_says_what_to_copy_and_run(bundle: Path) -> None:
    api.build(bundle, "tpu:dtype=bf16:chip=bm1688:cores=2", shapes=SIZES, emit_only=True)
    script = (bundle / "build-tpu.sh").read_text()
    unet = [line for line in script.splitlines() if "unet" in line]
    assert unet[0] == "mkdir -p build-tpu/unet bmodel/bm1688_bf16"
    assert unet[1] == (
        "(cd build-tpu/unet && model_transform --model_name sdv15_unet --model_def "
        "../../unet/tpu.onnx --input_shapes '[[2,4,9,11],[1],[2,77,96]]' --mlir size0.mlir)"
    )
    assert unet[2].endswith(
        "model_deploy --mlir size0.mlir --quantize BF16 --chip bm1688 --num_core 2 "
        "--model size0.bmodel)"
    )
    assert "[[2,4,8,8],[1],[2,77,96]]" in unet[3]
    assert unet[5].endswith(
        "model_tool --combine size0.bmodel size1.bmodel -o sdv15_unet_multisize.bmodel)"
    )
    assert unet[6].endswith("bmodel/bm1688_bf16/sdv15_unet_multisize.bmodel")
    assert re.search(r"vae_encoder.*model_deploy.*BF16.*--model size0", script)
    assert re.search(r"text_encoder.*model_deploy.*F32.*--model sdv15_text.bmodel", script)
    assert subprocess.run(["sh", "-n", bundle / "build-tpu.sh"], check=False).returncode == 0
    page = (bundle / "build-tpu.md").read_text()
    copied = re.findall(r"^    (\S+)$", page, re.M)
    assert {"build-tpu.sh", "unet/tpu.onnx"} <= set(copied)
    assert all((bundle / name).is_file() for name in copied)


@pytest.mark.parametrize(
    ("shapes", "batch", "reason"),
    [
        ("64x64..128x128", (1, 1), "fixed sizes, and 64x64..128x128 is a range"),
        ("64x64", (1, 2), "fixed batch, and 1..2 is a range"),
        ("60x64", (1, 1), "60x64 is no size"),
    ],
)
def test_sizes_that_cannot_be(
    tmp_path: Path, shapes: str, batch: tuple[int, int], reason: str
) -> None:
    path = small(tmp_path)
    with pytest.raises(UsageError, match=reason) as caught:
        Tpu().commands([order(path, shapes, batch)])
    assert caught.value.hint


def test_an_axis_that_is_a_range(tmp_path: Path) -> None:
    path, sizes = small(tmp_path), parse_sizes("64x64")
    request = Request(sizes, dims={"tokens": (16, 77)})
    profiles = request.profiles({"sample": ["batch_size", "tokens"]}, doubled=True)
    given = Order("unet", Role.DENOISER, path, profiles, sizes, (1, 1), lambda *_: None)
    with pytest.raises(UsageError, match="axis 1 of sample goes from 16 to 77"):
        Tpu().commands([given])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tpu:chip=bm1", "chip must be one of bm1684x, bm1688"),
        ("tpu:dtype=int8", "calibrated with recorded data"),
        ("tpu:data=recorded", "calibrated with recorded data"),
        ("tpu:dtype=fp8", "fp8"),
        ("tpu:cores=0", "cores must be 1 or more"),
    ],
)
def test_options_that_cannot_be(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        registry.make("targets", text)


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("", "knows of none"),
        ("nowhere/python", "is not there"),
        (sys.executable, "no tpu_mlir in this Python"),
    ],
)
def test_a_missing_compiler_is_said_before_anything_is_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, python: str, reason: str
) -> None:
    monkeypatch.delenv("SDOPT_TPU_PYTHON")
    target = Tpu(python=python)
    assert target.compiler() == {}
    before = sorted(bundle.rglob("*"))
    with pytest.raises(MissingDependencyError, match=reason) as caught:
        api.build(bundle, str(target), shapes="96x96")
    assert "make tpu-env" in str(caught.value.hint)
    assert sorted(bundle.rglob("*")) == before
    (note,) = target.check(order(bundle / "unet/optimized.onnx"))
    assert "no frontend is installed" in note


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Tpu]:
    """A target whose compiler is a shell script that does what the test says."""

    def make(body: str) -> Tpu:
        python = tmp_path / "python"
        probed = "echo '[\"1.30.2\", []]'; exit 0"
        python.write_text(f'#!/bin/sh\ncase "$2" in *importlib.metadata*) {probed};; esac\n{body}')
        python.chmod(0o755)
        return Tpu(python=str(python))

    return make


def test_a_compiler_that_succeeds_without_a_result(
    tmp_path: Path, fake: Callable[[str], Tpu]
) -> None:
    given, made = order(small(tmp_path)), tmp_path / "out" / "x.bmodel"
    made.parent.mkdir()
    with pytest.raises(BuildError, match="without an error and without size0"):
        fake("echo done").compile(given, made)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, fake: Callable[[str], Tpu]) -> None:
    given, made = order(small(tmp_path)), tmp_path / "out" / "x.bmodel"
    made.parent.mkdir()
    said = "echo chatter; echo RuntimeError: Op not support:Mish; echo more; exit 3"
    with pytest.raises(BuildError, match="model_transform ended with 3") as caught:
        fake(said).compile(given, made)
    assert caught.value.why == "RuntimeError: Op not support:Mish"


def test_a_folder_that_cannot_be_written(tmp_path: Path, bundle: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(bundle, copied, ignore=shutil.ignore_patterns("bmodel"))
    (copied / "bmodel").write_text("in the way")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '[\"1.30.2\", []]'\n")
    python.chmod(0o755)
    with pytest.raises(StorageError, match="could not write"):
        api.build(copied, str(Tpu(python=str(python))), components=["unet"], shapes="64x64")
    assert (copied / "bmodel").read_text() == "in the way"


def test_half_precision_is_widened_for_the_compiler(bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "copy")
    api.optimize(copied, "@fast,cast_fp16", components=["vae_decoder"], stage="half")
    (one,) = api.build(
        copied, "tpu", components=["vae_decoder"], source="half", shapes="64x64", emit_only=True
    ).components
    given = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)}
    found = Ort().open(Path(one.file), optimize=False).run(given)["sample"]
    assert found.dtype == np.float32
    wanted = Ort().open(copied / "vae_decoder" / "optimized.onnx").run(given)["sample"]
    assert relative_l2(found, wanted) < 5e-3
    half = modelfile.load(copied / "vae_decoder" / "half.onnx")
    with pytest.raises(BuildError, match="single precision"):
        Tpu().check_legal(half)


def test_companions_are_refused(bundle: Path) -> None:
    api.optimize(bundle, "@fast,hoist", components=["unet"], stage="hoisted")
    with pytest.raises(BuildError, match="companion graphs"):
        api.build(bundle, "tpu", components=["unet"], source="hoisted", emit_only=True)


def test_int8_is_not_emitted(bundle: Path) -> None:
    with pytest.raises(UsageError, match="int8 cannot be built from commands alone"):
        Tpu(dtype="int8", data="recorded").commands([order(bundle / "unet/optimized.onnx")])


def test_a_bmodel_without_its_record(
    tmp_path: Path, fake: Callable[[str], Tpu], bundle: Path
) -> None:
    path = tmp_path / "other.bmodel"
    path.write_bytes(b"bmodel")
    with pytest.raises(BundleError, match="record is missing"):
        fake("").open(path)
    with pytest.raises(UsageError, match="nothing was built of this graph"):
        fake("").open(bundle / "vae_encoder/optimized.onnx")


# int8: what was recorded becomes what the compiler calibrates with.


def recording(folder: Path, count: int = 4) -> Path:
    """Samples of ``small``'s inputs, both halves of guidance at 64x64."""
    writer, rng = recorded.Writer(folder), np.random.default_rng(0)
    for step in range(count):
        sample = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
        time_ = np.array(step, np.float32)
        writer.add("unet", {"sample": sample, "timestep": time_}, prompt="", seed=0, step=step)
    writer.commit("key", {}, {})
    return folder


def test_samples_are_listed_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    opened = recorded.open_recording(recording(tmp_path / "recorded", 2))
    shapes = {"timestep": (), "sample": (2, 4, 8, 8)}
    assert write_samples(opened, shapes, tmp_path / "samples0", "unet") == 2
    lines = (tmp_path / "samples0.txt").read_text().splitlines()
    assert lines == [f"samples0/{one:04}-0.npy,samples0/{one:04}-1.npy" for one in range(2)]
    first, second = (np.load(tmp_path / file) for file in lines[1].split(","))
    assert (first.shape, second.shape) == ((1,), (2, 4, 8, 8))
    with pytest.raises(UsageError, match=r"nothing recorded fits .*sample \[2, 4, 9, 11\]"):
        write_samples(opened, shapes | {"sample": (2, 4, 9, 11)}, tmp_path / "no", "unet")


@with_compiler
@pytest.mark.slow
def test_int8_is_calibrated_with_what_was_recorded(tmp_path: Path) -> None:
    target = Tpu(dtype="int8", data=str(recording(tmp_path / "recorded")))
    body = "c = Conv<pads=[1,1,1,1]>(sample, w) t = Reshape(timestep, one) y = Add(c, t)"
    kernel = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32)
    path = small(tmp_path, body, {"w": kernel, "one": np.array([1])})
    made = tmp_path / "out.bmodel"
    with artifacts.writing(made) as folder:
        facts = target.compile(order(path), folder / made.name)
        artifacts.commit(folder / made.name, made, "key", 0.0, {}, facts)
    assert (facts["quantize"], facts["samples"]) == ("INT8", 4)
    opened = recorded.open_recording(tmp_path / "recorded")
    given = opened.load(opened.samples[2])
    found, wanted = target.open(made).run(given), Ort().open(path).run(given)
    assert cosine(found["y"], wanted["y"]) >= COSINE
    assert relative_l2(found["y"], wanted["y"]) > 1e-3, "8 bits cannot be this near: not quantized"
