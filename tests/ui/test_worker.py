"""The process of a job: progress, verbs on real models, errors, cancelling in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from PIL import Image

from sdopt import api
from sdopt.bundle import JOBS, RAW, Bundle
from sdopt.errors import BundleError, UsageError
from sdopt.manifest import ComponentEntry, StageRecord
from sdopt.ui import verbs
from sdopt.ui.jobfolder import JobFolder
from sdopt.ui.jobs import Call, JobQueue, State
from sdopt.ui.records import VERBS, Asked
from sdopt.ui.worker import INTERVAL, Teller
from tests import building_bundle
from tests.runtime import toy
from tests.ui.acting import act, install, over, until, working

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SIDE, LAYERS = 8192, 4
"""Four weights of 256 MiB, holes of a file: a cast of them takes a second."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobQueue]:
    """A queue over a root with a checkpoint, and a bundle that draws."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(DIGITS, root / "digits")
    toy.bundle(root / "toy")
    building_bundle.make(root / "unet")
    (root / "torch.py").write_text("raise SystemExit('a file of the root was imported')\n")
    with working(root) as queue:
        yield queue


@pytest.fixture
def root(shared: JobQueue) -> Path:
    return shared._root


def test_a_job_takes_a_model_all_the_way(shared: JobQueue, root: Path) -> None:
    drawn = {"bundle": "toy", "prompts": ["7", "3"], "steps": 2, "height": 64, "width": 64}
    calls = [
        Call("export", {"source": "digits", "components": ["vae_decoder"], "dtype": "fp32"}),
        Call("optimize", {"passes": "@fast"}),
        Call("build", {"targets": ["ort"], "batch": [1, 2]}),
        Call("run", {**drawn, "seed": 5}),
        Call("run", {**drawn, "image": "digits/sheet.png", "strength": 0.5}),
    ]
    name = shared.submit("made", "all the way", calls)
    (job,) = over(shared, name)
    assert job.state is State.DONE, job.log
    exported, optimized, built, images, more = job.results
    assert [one["verb"] for one in (exported, optimized, built)] == ["export", "optimize", "build"]
    assert exported["bundle"] == "made"  # relative: nobody is told where the server keeps it
    assert [one.step for one in job.events] == sorted(one.step for one in job.events)
    shares = [one.share for one in job.events]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    told = [(one.step, one.what) for one in job.events]
    assert (0, "vae_decoder: trace") in told
    assert (1, "vae_decoder: fuse_qkv") in told  # every pass with its name
    assert (2, "ort: vae_decoder: write") in told
    assert (3, "image 2 of 2, step 1 of 2") in told
    stages = Bundle.open(root / "made").stages("vae_decoder")
    assert stages == ("model", "optimized", "ort_cpu")

    folder = f"made/{JOBS}/{name}/images"
    assert images["images"] == [f"{folder}/0000.png", f"{folder}/0001.png"]
    assert more["images"] == [f"{folder}/0002.png", f"{folder}/0003.png"]
    for path, facts, seed in zip(images["images"], images["facts"], "56", strict=True):
        with Image.open(root / path) as image:
            assert image.size == (64, 64)
            assert image.info == facts  # as `sdopt run` writes them
        assert facts["seed"] == seed


def test_a_bundle_does_not_mind_its_jobs(shared: JobQueue, root: Path) -> None:
    """What is exported, inspected, packed and found again without a manifest has no jobs."""
    name = shared.submit("unet", "title", [Call("pack", {"output": "packed"})])
    (job,) = over(shared, name)
    assert job.state is State.DONE, job.log
    assert job.results[0]["file"] == "packed"
    assert (root / "unet" / JOBS / name / "done").exists()
    assert {one.name for one in (root / "packed").iterdir()} == {"manifest.json", "unet"}
    before = api.inspect(root / "unet")
    (root / "unet" / "manifest.json").unlink()
    after = api.inspect(root / "unet")
    assert {**before, "origin": "", "family": ""} == {**after, "origin": "", "family": ""}

    only_jobs = root / "empty"
    shared.submit("empty", "title", [Call("optimize", {"passes": "clean"})])
    with pytest.raises(BundleError, match="no sdopt bundle"):
        api.inspect(only_jobs)
    (only_jobs / "notes.txt").touch()
    with pytest.raises(BundleError, match="not empty"):
        api.export(DIGITS, only_jobs)


def test_errors_have_hints_and_no_traceback(shared: JobQueue) -> None:
    calls = [
        Call("optimize", {"passes": "cleen"}),
        Call("optimize", {"passes": "clean", "require": "attention=99"}),
    ]
    jobs = over(shared, *(shared.submit("toy", "title", [one, act("no")]) for one in calls))
    assert {one.state for one in jobs} == {State.FAILED}
    unknown, unmet = (one.error for one in jobs)
    assert unknown.what == "unknown pass 'cleen'"
    assert unknown.hint == "did you mean clean?"
    assert unknown.where.startswith("cleen\n^")
    assert unmet.what == "attention=99 is not met, so nothing was written"
    assert jobs[1].results[0]["met"] is False  # its report is there all the same
    for one in jobs:
        assert "Traceback" not in one.log
        assert one.error.what in one.log


def test_other_errors_have_their_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "acts", monkeypatch)
    (tmp_path / "root").mkdir()
    with working(tmp_path / "root") as queue:
        (job,) = over(queue, queue.submit("b", "title", [act("bug")]))
    assert job.state is State.FAILED
    assert job.error.what == "ZeroDivisionError: no number"
    assert job.error.hint == "this is a bug: the log has the traceback"
    assert job.log.startswith("Traceback")
    assert job.log.endswith("ZeroDivisionError: no number\n")


def sparse(root: Path) -> Bundle:
    """A bundle of one component: a chain of Linear layers, 1 GiB that takes no space."""
    made = Bundle.create(root, "toy", "test", {"unet": ComponentEntry("unet", "denoiser")}, by="0")
    size, single = SIDE * SIDE * 4, ir.TensorType(ir.DataType.FLOAT)
    (root / "unet").mkdir()
    with open(root / "holes", "wb") as file:
        file.truncate(size * LAYERS)
    x = ir.Value(name="x", shape=ir.Shape(["n", SIDE]), type=single)
    nodes, weights, value = [], [], x
    for index in range(LAYERS):
        name, shape = f"layers.{index}.weight", ir.Shape([SIDE, SIDE])
        held = ir.ExternalTensor(
            "holes", index * size, size, single.dtype, shape=shape, name=name, base_dir=root
        )
        weights.append(ir.Value(name=name, shape=shape, type=single, const_value=held))
        nodes.append(ir.node("MatMul", [value, weights[-1]], name=f"product_{index}"))
        value = nodes[-1].outputs[0]
        value.name = f"y{index}"
    value.shape, value.type = ir.Shape(["n", SIDE]), single
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="chain"
    )
    record = StageRecord("unet", "denoiser", RAW, "", "f" * 8, "toy", "test", "float32", "k")
    with made.lock():
        made.commit(ir.Model(graph, ir_version=10), record)
        made.write_manifest()
    (root / "holes").unlink()
    return made


def files(folder: Path) -> dict[str, int]:
    """Every file of a component by name, with its size."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def half_written(folder: Path) -> bool:
    """Whether a weights file is being written."""
    return any(path.stat().st_size > 1 << 20 for path in folder.glob("*-tmp*"))


def test_a_cast_that_is_cancelled_or_killed_leaves_the_bundle_whole(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "big").folder("unet")
    before, lock = files(folder), folder.parent / JOBS
    with working(tmp_path) as queue:
        name = queue.submit("big", "title", [Call("optimize", {"passes": "cast_fp16"})])
        until(lambda: half_written(folder))
        queue.cancel(name)
        (job,) = over(queue, name)
        assert job.state is State.CANCELLED
        assert job.what == "unet: write"
        assert files(folder) == before  # not even a temporary file

        name = queue.submit("big", "title", [Call("optimize", {"passes": "cast_fp16"})])
        until(lambda: half_written(folder))
        os.kill(int((lock / name / "lock").read_text()), signal.SIGKILL)
        until(lambda: queue.job(name).what == "interrupted, started again")
        queue.cancel(name)
        over(queue, name)
        after = {key: size for key, size in files(folder).items() if "-tmp" not in key}
        assert after == before
        assert after != files(folder)  # nobody could remove what it wrote

        name = queue.submit("big", "title", [Call("optimize", {"passes": "clean"})])
        (job,) = over(queue, name)
        assert job.state is State.DONE, job.log
    assert {key: files(folder)[key] for key in before} == before
    assert not [key for key in files(folder) if "-tmp" in key or key.startswith(".")]
    assert Bundle.open(tmp_path / "big").stages("unet") == ("model", "optimized")


def test_events_are_not_more_than_anyone_can_read(tmp_path: Path) -> None:
    job = JobFolder(tmp_path / "b" / JOBS / "20260101-000000-000000")
    job.create(Asked("title", (Call("optimize"), Call("build")), 1.0))
    job.start()
    now = 0.0
    tell = Teller(job, 1, 2, lambda: now)
    for index in range(1000):
        tell("unet: clean", index / 1000)
        now += INTERVAL / 50
    tell("unet: fuse_qkv", 0.0)  # the first of something else comes at once
    tell("unet: fuse_qkv", 0.0)
    tell("unet: write", 1.0)
    lines = job.view().events
    assert [one.what for one in lines[-2:]] == ["unet: fuse_qkv", "unet: write"]
    assert [one.what for one in lines[:-2]] == ["unet: clean"] * 20
    assert lines[0].share == 0.5  # the second of two calls
    assert lines[-1].share == 1.0
    assert {one.step for one in lines} == {1}


# In this process: what each verb is called with, and what it gives.


def perform(root: Path, verb: str, **arguments: Any) -> dict[str, Any]:
    """A call as the process of a job carries it out."""
    job = JobFolder(root / "b" / JOBS / f"20260101-000000-{len(list(root.rglob('*'))):06x}")
    call = Call(verb, arguments)
    job.create(Asked("title", (call,), 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        tell = Teller(job, 0, 1)
        work = verbs.Work(root, job, call, tell, lambda result: job.keep(0, result))
        result = verbs.perform(work)
    json.dumps(result)
    assert str(root) not in json.dumps(result)
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two stages of a small denoiser."""
    root = tmp_path_factory.mktemp("place")
    building_bundle.make(root / "b")
    api.optimize(root / "b", "@fast")
    return root


def test_every_verb_has_its_function() -> None:
    assert tuple(verbs._VERBS) == VERBS


def test_compare_gives_plots_of_layers(place: Path) -> None:
    plain = perform(place, "compare", a="b@optimized", b="b@model")
    assert plain["passed"] is True
    assert (plain["a"], plain["b"]) == ("b@optimized", "b@model")
    found = perform(place, "compare", a="b", b="b/unet/model.onnx", layers=True)
    assert [one["component"] for one in found["layers"]] == ["unet"]
    (image,) = found["images"]
    assert (place / image).read_bytes().startswith(b"\x89PNG")
    assert "<html" in (place / found["file"]).read_text()


def test_bench_and_report_write_pages_into_the_job(place: Path) -> None:
    quick = {"rounds": 1, "warm_up": 1, "pause": 0, "memory": False, "images": False}
    found = perform(place, "bench", html=True, stages=["model"], **quick)
    assert found["bundle"] == "b"
    assert "<html" in (place / found["file"]).read_text()
    (place / "bench.json").write_text(json.dumps(found))
    page = perform(place, "report", images=False, stages=["optimized"], benchmark="bench.json")
    assert page["file"].startswith(f"b/{JOBS}/")
    assert page["size_bytes"] == (place / page["file"]).stat().st_size


def test_fetch_is_called_as_its_module_wants(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(
        url: str,
        folder: Path,
        *,
        limit_bytes: int,
        sha256: str | None = None,
        allow_private: bool = False,
        progress: Any = None,
    ) -> Path:
        progress("3 of 4 bytes", 0.75)
        assert (url, folder, limit_bytes) == ("https://example.org/x", Path("files"), 4)
        return folder / "x.safetensors"

    module = types.ModuleType("sdopt.ui.fetching")
    module.fetch = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sdopt.ui.fetching", module)
    given = {"url": "https://example.org/x", "folder": "files", "limit_bytes": 4}
    assert perform(place, "fetch", **given) == {"file": "files/x.safetensors"}
    with pytest.raises(UsageError, match="fetch takes no 'headers'"):
        perform(place, "fetch", **given, headers={})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "~/x", "out/x", "a\0b"])
@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("optimize", {"passes": "clean", "bundle": "PATH"}),
        ("optimize", {"passes": "PATH.txt"}),
        ("export", {"source": "PATH"}),
        ("export", {"source": "b", "output": "PATH"}),
        ("export", {"source": "b", "supplied": {"vae": "PATH"}}),
        ("export", {"source": "b", "lora": ["PATH:0.5"]}),
        ("run", {"prompts": ["x"], "image": "PATH"}),
        ("run", {"prompts": ["x"], "loras": ["PATH"]}),
        ("run", {"prompts": ["x"], "loras": [["PATH", 0.5]]}),
        ("compare", {"a": "PATH", "b": "b"}),
        ("compare", {"a": "b", "b": "PATH@model"}),
        ("compare", {"a": "b", "b": "b", "recorded": "PATH"}),
        ("pack", {"output": "PATH"}),
        ("bench", {"recorded": "PATH"}),
        ("report", {"output": "PATH"}),
        ("report", {"evaluation": "PATH"}),
    ],
)
def test_no_path_leads_out(
    place: Path, verb: str, arguments: dict[str, Any], path: str, tmp_path: Path
) -> None:
    link = place / "out"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    given = json.loads(json.dumps(arguments).replace("PATH", json.dumps(path)[1:-1]))
    with pytest.raises(UsageError, match=r"no (place in|path of)"):
        perform(place, verb, **given)
    assert list(tmp_path.iterdir()) == []


def test_options_are_those_of_the_function(place: Path) -> None:
    with pytest.raises(UsageError, match="optimize takes no 'pass'") as caught:
        perform(place, "optimize", passes="clean", **{"pass": "clean"})
    assert caught.value.hint == "did you mean passes?"
    with pytest.raises(UsageError, match="build needs 'targets'"):
        perform(place, "build")
    with pytest.raises(UsageError, match="run takes no 'progress'"):
        perform(place, "run", prompts=["x"], progress="x")


def test_code_of_a_page_is_not_run(place: Path) -> None:
    with pytest.raises(UsageError, match="compare takes no 'hooks'"):
        perform(place, "compare", a="b", b="b", hooks="hooks.py")
