"""Whole sweeps of a bundle that computes next to nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import MissingDependencyError, SdoptError, UsageError
from sdopt.locking import alone_in
from sdopt.sweep import applying, report
from sdopt.sweep.asking import Asked, asked
from sdopt.sweep.engines.base import OnDone, Schedule
from sdopt.sweep.engines.inline import Inline
from sdopt.sweep.place import Place
from sdopt.sweep.records import Outcome, Task
from sdopt.sweep.result import Result
from sdopt.sweep.sweeping import run
from tests.runtime import toy
from tests.sweep import miniature
from tests.test_cli import Shell

QUICK: dict[str, Any] = {
    "passes": ["clean"],
    "shapes": "64x64",
    "prompts": ["a cat", "a dog", "a cow"],
    "measure": ["time", "score"],
    "steps": 1,
    "guidance": 1.0,
    "rounds": 1,
    "pause": 0.0,
    "probe": 0,
}

SCORER = """
def light(images, prompts):
    import numpy
    return [float(numpy.asarray(one).mean()) / 255 for one in images]

def long(images, prompts):
    return [float(len(one)) for one in prompts]
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    (root / "mine.py").write_text(SCORER)
    return toy.bundle(root / "b").path


@pytest.fixture(scope="module")
def scored(bundle: Path) -> dict[str, Any]:
    return {**QUICK, "scorer": f"{bundle.parent / 'mine.py'}:light"}


def sweep(bundle: Path, folder: Path, **options: Any) -> Result:
    return api.sweep(bundle, folder, **options)


class Planted:
    """An engine that measures nothing: what comes of a task is planted, by its label."""

    label = "planted"

    def __init__(self, place: Place, plant: Callable[[Task], Mapping[str, Any]]) -> None:
        self.place, self.plant = place, plant
        self.ran: list[Task] = []

    def __enter__(self) -> Planted:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, tasks: Sequence[Task], known: Mapping[str, Outcome], on_done: OnDone) -> None:
        schedule = Schedule(tasks, known, quiet=True)
        while not schedule.done:
            task = schedule.ready()[0]
            schedule.start(task)
            self.ran.append(task)
            outcome = Outcome(task.key, self.plant(task), here={"cpu": "x", "cards": []})
            for one, found in schedule.finish(task, outcome):
                on_done(one, found)


def planted(bundle: Path, folder: Path, ms: dict[str, float], score: dict[str, float]) -> Any:
    """A sweep over tome=1..N whose times and scores are given by the number of blocks."""

    def plant(task: Task) -> Mapping[str, Any]:
        if task.kind in ("stage", "build"):
            return {"stage": "x", "graphs": {}}
        blocks = task.label.partition("tome=")[2][0]
        if task.kind == "time":
            rounds = [ms[blocks]]
            return {"ms": ms[blocks], "rounds": rounds, "denoiser_ms": 1.0, "memory_bytes": None}
        images = [
            {"prompt": i, "seed": i, "text": text, "path": "x.png", "digest": "", "score": value}
            for i, text in task.work["prompts"]
            for value in [score[blocks] if i < 2 else 0.5]
        ]
        return {"images": images}

    engines: list[Planted] = []

    def make(place: Place) -> Planted:
        engines.append(Planted(place, plant))
        return engines[-1]

    options = {**QUICK, "probe": 2, "passes": ["tome=1..4"], "measure": ["time", "score"]}
    wanted = Asked(**{**options, "scorer": f"{bundle.parent / 'mine.py'}:light"})
    found = run(bundle, folder, wanted.space(Bundle.open(bundle)), wanted.settings(), engine=make)
    return found, engines[-1].ran


def test_what_is_worse_on_every_axis_is_given_up_and_not_drawn_to_the_end(
    bundle: Path, tmp_path: Path
) -> None:
    ms = {"1": 10.0, "2": 20.0, "3": 5.0, "4": 20.0}
    score = {"1": 0.9, "2": 0.8, "3": 0.1, "4": 0.9}
    found, ran = planted(bundle, tmp_path / "s", ms, score)
    states = {one.recipe: one.state for one in found.points}
    # 4 is as good as 1 by its score: worse on every axis is 2 alone.
    assert states == {"tome=1": "done", "tome=2": "stopped", "tome=3": "done", "tome=4": "done"}
    stopped = next(one for one in found.points if one.state == "stopped")
    assert stopped.reason == ("after 2 prompts worse on every axis than tome=1 on ort, batch 1")
    assert (stopped.prompts, stopped.frontier) == (2, False)
    drawn = {(one.label[:6], len(one.work["prompts"])) for one in ran if one.kind == "score"}
    assert ("tome=2", 1) not in drawn
    assert {("tome=1", 1), ("tome=3", 1), ("tome=4", 1), ("tome=2", 2)} <= drawn
    assert [one.recipe for one in found.points if one.frontier] == ["tome=1", "tome=3"]
    # Going on changes nothing and runs nothing.
    again, ran = planted(bundle, tmp_path / "s", ms, score)
    assert ran == []
    assert again.points == found.points


def test_a_recipe_that_fails_is_recorded_with_its_reason_and_the_others_go_on(
    bundle: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    # TensorRT has no flag for types: a graph without an integer in it is refused.
    target = ["ort", "trt_rtx:dtype=int8:sm=86"]
    found = sweep(bundle, tmp_path / "s", **{**scored, "target": target, "measure": ["score"]})
    good, bad = found.points
    assert (good.state, bad.state) == ("done", "failed")
    assert "nothing in unet is in int8" in bad.reason
    assert bad.score is None
    assert good.frontier
    assert bad.reason in json.dumps(report.table(found))


def test_equal_graphs_are_built_once_and_drawn_with_by_each(
    bundle: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    # Nothing in this graph is a GELU: the second pass leaves it as it is.
    passes = ["clean,|quick_gelu"]
    found = sweep(bundle, tmp_path / "s", **{**scored, "passes": passes, "measure": ["score"]})
    assert [one.state for one in found.points] == ["done", "done"]
    builds = list((found.work / "bundle" / "unet").glob("built-*.onnx"))
    assert len(builds) == 1
    assert len(list((found.work / "bundle" / "unet").glob("stage-*.onnx"))) == 2
    assert found.points[0].digests == found.points[1].digests


def test_likeness_to_the_raw_graphs_images(bundle: Path, tmp_path: Path) -> None:
    options = {**QUICK, "passes": ["", "cast_fp16:keep=io"], "measure": ["score"]}
    found = sweep(bundle, tmp_path / "s", **{**options, "distance": True, "prompts": ["a cat"]})
    raw, half = found.points
    assert raw.score == 1.0
    assert half.score is not None
    paths = [found.work / one.samples[0].path for one in (raw, half)]
    a, b = (np.asarray(Image.open(path).convert("RGB"), float) / 255 for path in paths)
    assert half.score == pytest.approx(1 - np.sqrt(np.mean((a - b) ** 2)), abs=1e-12)
    assert found.scorer == "likeness to the raw graph's images"


def test_seeds_are_those_of_run(bundle: Path, scored: dict[str, Any], tmp_path: Path) -> None:
    options = {**scored, "passes": [""], "measure": ["score"], "seeds": [5, 11], "probe": 2}
    found = sweep(bundle, tmp_path / "s", **options)
    (point,) = found.points
    assert [(x.prompt, x.seed) for x in point.samples] == [
        *((0, 5), (1, 6), (2, 7), (0, 11), (1, 12), (2, 13)),
    ]
    assert point.prompts == 3
    (drawn,) = api.run(
        bundle, ["a dog"], seed=12, steps=1, guidance=1.0, width=64, height=64, stage="model"
    )
    image = Image.open(found.work / point.samples[4].path).convert("RGB")
    assert np.array_equal(np.asarray(image), np.asarray(drawn.image))


def test_memory_is_that_of_a_process_of_its_own(bundle: Path, tmp_path: Path) -> None:
    found = sweep(bundle, tmp_path / "s", **{**QUICK, "measure": ["memory"]})
    (point,) = found.points
    assert point.memory_bytes is not None
    assert 1e8 < point.memory_bytes < 4e9
    assert found.axes == ("memory_bytes",)
    assert point.ms is None
    assert point.frontier


def test_a_folder_is_of_one_sweep_and_says_what_differs(
    bundle: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    options = {**scored, "measure": ["score"], "prompts": ["a cat"]}
    first = sweep(bundle, tmp_path / "s", **options)
    with pytest.raises(UsageError, match="another sweep") as caught:
        sweep(bundle, tmp_path / "s", **{**options, "steps": 2})
    assert caught.value.why == "settings.steps was 1, is 2"
    with pytest.raises(UsageError, match="another sweep"):
        sweep(bundle, tmp_path / "s", **{**options, "scorer": options["scorer"][:-5] + "long"})
    # More points of the same sweep come on top.
    more = sweep(bundle, tmp_path / "s", **{**options, "passes": ["clean", ""]})
    assert [one.recipe for one in more.points] == ["clean", ""]
    assert more.points[0].samples == first.points[0].samples
    with alone_in(tmp_path / "s", "sweeps"), pytest.raises(UsageError, match="another sdopt"):
        sweep(bundle, tmp_path / "s", **options)
    with pytest.raises(UsageError, match="not in it"):
        sweep(bundle, bundle / "sweep", **options)
    assert not (bundle / "sweep").exists()
    with pytest.raises(UsageError, match="no sweep here"):
        report.load(tmp_path)


def test_the_raw_stage_is_what_it_is_of(scored: dict[str, Any], tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "b").path
    options = {**scored, "measure": ["score"], "prompts": ["a cat"]}
    sweep(made, tmp_path / "s", **options)
    path = made / "scheduler" / "scheduler_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "beta_end": 0.02}))
    with pytest.raises(UsageError, match="another sweep") as caught:
        sweep(made, tmp_path / "s", **options)
    assert "bundle.configuration was" in str(caught.value.why)


def test_a_worker_that_is_killed_is_replaced_and_one_that_always_dies_is_an_outcome(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, pathlib, signal\n"
        "def score(images, prompts):\n"
        "    mark = pathlib.Path(__file__).with_name('once')\n"
        "    lion = 'lion' in prompts[0] and not mark.with_name('tame').exists()\n"
        "    if lion or not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [0.5 for one in images]\n"
    )
    options = {**QUICK, "measure": ["score"], "scorer": f"{tmp_path / 'deadly.py'}:score"}
    found = sweep(bundle, tmp_path / "s", **{**options, "workers": 1})
    assert found.points[0].score == 0.5
    assert found.engine == "1 process"
    tries = {row[1]: row[3] for row in miniature.rows(tmp_path / "s").values()}
    assert tries == {"stage": 1, "build": 1, "score": 2}
    lines = (found.work / "images").glob("*/0/images.jsonl")
    assert [len(one.read_text().splitlines()) for one in lines] == [3]  # drawn once all the same
    lost = sweep(bundle, tmp_path / "t", **{**options, "workers": 1, "prompts": ["a lion"]})
    assert lost.points[0].state == "failed"
    assert "its process ended before it was done" in lost.points[0].reason
    assert "SIGKILL" in lost.points[0].reason
    # That says nothing of the recipe: it is tried again when the sweep goes on.
    (tmp_path / "tame").touch()
    tamed = sweep(bundle, tmp_path / "t", **{**options, "prompts": ["a lion"]})
    assert (tamed.points[0].state, tamed.points[0].score) == ("done", 0.5)


def test_an_interrupted_sweep_tells_of_what_it_has(
    bundle: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    folder, seen = tmp_path / "s", []

    def stop(what: str, share: float) -> None:
        if "time" in what:
            seen.append(report.load(folder))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(bundle, folder, **{**scored, "passes": ["clean", ""]}, progress=stop)
    assert [one.state for one in seen[0].points] == ["pending", "pending"]
    assert sum(one.ms is not None for one in seen[0].points) == 1
    before = miniature.rows(folder)
    whole = sweep(bundle, folder, **{**scored, "passes": ["clean", ""]})
    assert [one.state for one in whole.points] == ["done", "done"]
    after = miniature.rows(folder)
    assert {key: after[key] for key in before} == before


def test_the_recipe_to_use_is_applied_to_the_bundle(
    scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = toy.bundle(tmp_path / "b").path
    monkeypatch.chdir(tmp_path)
    found = sweep(made, tmp_path / "s", **{**scored, "passes": ["clean"], "measure": ["score"]})
    sdopt = Shell(monkeypatch, capsys)
    code, out, err = sdopt("sweep", "best", "s", "--apply", "--name", "mine")
    assert (code, out) == (0, "clean\n")
    assert f"sdopt run {made} --stage mine" in err
    opened = Bundle.open(made)
    assert {"mine", "mine-stage"} < {*opened.stages("unet")}
    assert opened.stage("unet", "mine-stage").record.history[0].spec == "clean"
    (drawn,) = api.run(made, ["a cat"], steps=1, guidance=1.0, width=64, height=64, stage="mine")
    image = Image.open(found.work / found.points[0].samples[0].path).convert("RGB")
    assert np.array_equal(np.asarray(image), np.asarray(drawn.image))
    with pytest.raises(SdoptError):
        applying.apply(made, found.points[0], "../x")


def test_the_command_and_what_it_prints(
    bundle: Path, scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    sdopt = Shell(monkeypatch, capsys)
    (tmp_path / "lines.txt").write_text("a cat\na dog\na cow\n")
    words = ["sweep", str(bundle), "--passes", "clean,|cast_fp16:keep=io", "--shapes", "64x64"]
    words += ["--prompts", "lines.txt", "--limit", "2", "--scorer", scored["scorer"]]
    words += ["--steps", "1", "--guidance", "1", "--rounds", "1", "--pause", "0"]
    words += ["--measure", "time,score", "-o", "out"]
    code, out, err = sdopt(*words, "--html", "page.html")
    assert (code, out) == (0, "out\n")
    assert "sweep: 2 points" in err
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    code, out, _ = sdopt("sweep", "show", "out", "--json")
    found = json.loads(out)
    assert (code, found["kind"], len(found["points"])) == (0, "sweep", 2)
    assert found["settings"]["steps"] == 1
    # The one line of a point measures that point again.
    point = found["points"][1]
    command = point["command"].split()
    assert command[:2] == ["sdopt", "sweep"]
    code, out, _ = sdopt(*command[1:], "--json")
    (again,) = json.loads(out)["points"]
    same = ("recipe", "target", "shape", "batch", "score", "digests")
    assert [again[name] for name in same] == [point[name] for name in same]
    code, out, err = sdopt("sweep", "best", "out", "--min-score", "2")
    assert (code, out) == (2, "")
    assert "--min-score 2: the best is" in err
    code, out, _ = sdopt("sweep", "best", "out", "--min-score", "0", "--json")
    assert (code, json.loads(out)["frontier"]) == (0, True)


def test_a_sweep_file_has_the_options_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCORER)
    (tmp_path / "lines.txt").write_text("a cat\na dog\n")
    file = tmp_path / "x.toml"
    file.write_text(
        'passes = "@fast,tome=0..3"\ntarget = ["ort"]\nbatch = [1, 2]\nseeds = 3\n'
        'prompts = "lines.txt"\nscorer = "mine.py:long"\nsteps = 7\n'
    )
    found = asked(file, {"steps": 9, "guidance": None})
    assert (found.passes, found.batch, found.seeds) == (["@fast,tome=0..3"], [1, 2], [3])
    settings = found.settings()
    assert (settings.steps, settings.guidance, settings.prompts) == (9, 7.5, ("a cat", "a dog"))
    assert settings.scoring.place == f"{tmp_path / 'mine.py'}:long"
    assert asked(file, {"distance": True}).settings().scoring.kind == "distance"
    file.write_text("pases = []\n")
    with pytest.raises(SdoptError, match="no option 'pases'") as caught:
        asked(file, {})
    assert "did you mean passes" in str(caught.value.hint)
    for text in ('steps = "many"\n', "passes = [\n", "batch = [1.5]\n"):
        file.write_text(text)
        with pytest.raises(UsageError):
            asked(file, {})
    with pytest.raises(UsageError, match="cannot be read"):
        asked(tmp_path / "nowhere.toml", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says how good an image is"),
        ({"scorer": "nowhere.py:f"}, "this scorer cannot be imported"),
        ({"clip": "nowhere"}, "CLIP"),
        ({"distance": True, "scorer": "x.py:f"}, "one scorer at a time"),
        ({"distance": True, "prompts": ()}, "no prompt to draw"),
        ({"distance": True, "prompts": "nowhere.txt"}, "cannot be read"),
        ({"measure": ["tiem"]}, "nothing is called 'tiem'"),
        ({"measure": []}, "nothing to measure"),
        ({"measure": ["time"], "steps": 0}, "steps must be 1 or more"),
        ({"measure": ["time"], "probe": -1}, "0 or more"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    bundle: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    plain = {**QUICK, "measure": ["time", "score"]}
    with pytest.raises(SdoptError, match=message):
        sweep(bundle, tmp_path / "s", **{**plain, **options})
    assert not (tmp_path / "s").exists()


def test_either_workers_or_a_cluster(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either workers"):
        sweep(bundle, tmp_path / "s", **QUICK, distance=True, workers=2, ray="auto")


def test_parquet_wants_pyarrow(
    bundle: Path, scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sweep(bundle, tmp_path / "s", **{**scored, "measure": ["score"], "prompts": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pyarrow"):
        report.export(found, tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_inline_and_processes_come_to_the_same(
    bundle: Path, scored: dict[str, Any], tmp_path: Path
) -> None:
    options = {**scored, "passes": ["clean,|cast_fp16:keep=io", ""], "measure": ["score"]}
    one = sweep(bundle, tmp_path / "a", **options)
    two = sweep(bundle, tmp_path / "b", **options, workers=2)
    assert (one.engine, two.engine) == (Inline.label, "2 processes")
    assert miniature.points(one) == miniature.points(two)
    assert len(one.points) == 3
