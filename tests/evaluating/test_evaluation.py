"""What is drawn, once and for good, and what its scores come to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
import pytest
from PIL import Image

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, UnknownNameError, UsageError, WorkerError
from sdopt.evaluating import pages
from sdopt.evaluating.figures import difference, figures
from sdopt.evaluating.scorers import FunctionScorer, load_function
from sdopt.runtime import drawer
from tests.browser import opened
from tests.runtime import toy

SMALL: dict[str, Any] = {"steps": 2, "guidance": 2.0, "width": 64, "height": 64}
TABLE = "Prompt\tCategory\tChallenge\tNote\n" + "".join(
    f"a handwritten {word}\t{kind}\tBasic\t\n"
    for word, kind in (("one", "odd"), ("two", "even"), ("three", "odd"), ("four", "even"))
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = toy.bundle(tmp_path_factory.mktemp("eval") / "bundle")
    toy.restage(made, "unet", "other")
    return made.path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.tsv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are written in this process, as they are."""
    names: list[str] = []
    write = drawer.save_png

    def logged(made: Any, path: Path, more: Any = None) -> bytes:
        names.append(path.name)
        return write(made, path, more)

    monkeypatch.setattr(drawer, "save_png", logged)
    return names


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(one).mean()) for one in images]


def scored(function: Callable[..., Any], digest: str = "0") -> FunctionScorer:
    return FunctionScorer("a function", digest, function)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_are_those_of_run_from_seeds_that_nothing_else_moves(
    bundle: Path, prompts: Path, tmp_path: Path
) -> None:
    texts = [line.split("\t")[0] for line in TABLE.splitlines()[1:]]
    out = tmp_path / "out"
    api.evaluate(bundle, prompts, out, seed=5, images_per_prompt=2, batch=3, **SMALL)
    for index, made in enumerate(api.run(bundle, texts, seed=5, **SMALL)):
        found = pixels(out / "model" / "images" / f"{index}_0.png")
        np.testing.assert_array_equal(found, np.asarray(made.image))
    (second,) = api.run(bundle, texts[2:3], seed=5 + 2 + 1_000_000, **SMALL)
    found = pixels(out / "model" / "images" / "2_1.png")
    np.testing.assert_array_equal(found, np.asarray(second.image))

    few = {"categories": ["even"], "seed": 5, "batch": 2}
    api.evaluate(bundle, prompts, tmp_path / "few", **few, **SMALL)
    whole = files(out / "model")
    assert files(tmp_path / "few" / "model") == {
        name: whole[name] for name in ("1_0.png", "3_0.png")
    }


def test_image_info_says_which_image_is_of_which_prompt(
    bundle: Path, prompts: Path, tmp_path: Path
) -> None:
    api.evaluate(bundle, prompts, tmp_path / "out", images_per_prompt=2, limit=2, **SMALL)
    assert json.loads((tmp_path / "out" / "model" / "image_info.json").read_text()) == [
        {
            "images": ["images/0_0.png", "images/0_1.png"],
            "prompt": "a handwritten one",
            "category": "odd",
        },
        {
            "images": ["images/1_0.png", "images/1_1.png"],
            "prompt": "a handwritten two",
            "category": "even",
        },
    ]
    lines = tmp_path / "lines.txt"
    lines.write_text("a handwritten two\n")
    api.evaluate(bundle, lines, tmp_path / "plain", **SMALL)
    (row,) = json.loads((tmp_path / "plain" / "model" / "image_info.json").read_text())
    assert row["category"] == "Not_specified"


def test_finished_images_are_drawn_once_whatever_the_record_lost(
    bundle: Path, prompts: Path, tmp_path: Path, drawn: list[str]
) -> None:
    out = tmp_path / "out"

    def again(count: int = 1) -> list[str]:
        drawn.clear()
        api.evaluate(bundle, prompts, out, images_per_prompt=count, **SMALL)
        return list(drawn)

    assert len(again()) == 4
    assert again() == []
    assert again(2) == ["0_1.png", "1_1.png", "2_1.png", "3_1.png"]
    before = files(out / "model")
    record = out / "model" / "images.jsonl"
    lines = record.read_bytes()
    record.write_bytes(lines[:-10])  # killed while the last line was written
    assert again(2) == []
    record.unlink()  # killed before any line was written
    assert again(2) == []
    assert len(record.read_text().splitlines()) == 8
    assert files(out / "model") == before

    (out / "model" / "images" / "0_0.png").unlink()
    damaged = out / "model" / "images" / "1_0.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    strange = out / "model" / "images" / "3_1.png"
    Image.new("RGB", (64, 64)).save(strange)  # of nobody's: it does not say what it shows
    assert again(2) == ["0_0.png", "1_0.png", "3_1.png"]
    assert files(out / "model") == before
    record.write_text("no JSON\n" + record.read_text())
    with pytest.raises(BundleError, match="damaged") as caught:
        again(2)
    assert "line 1" in str(caught.value)


DRIVER = """
import sys
from sdopt import api
api.evaluate(sys.argv[1], [f"prompt {i}" for i in range(30)], sys.argv[2], batch=2,
             images_per_prompt=3, workers=2, **SMALL)
"""


def test_a_kill_in_the_middle_costs_nothing_that_was_finished(
    bundle: Path, tmp_path: Path, drawn: list[str]
) -> None:
    out = tmp_path / "out"
    images = out / "model" / "images"
    words = [sys.executable, "-c", DRIVER.replace("SMALL", repr(SMALL)), str(bundle), str(out)]
    driver = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        deadline = time.monotonic() + 120
        while len(list(images.glob("*.png"))) < 6:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        workers = psutil.Process(driver.pid).children(recursive=True)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers end with the process that they work for"

    there = {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")}
    assert 6 <= len(there) < 90
    texts = [f"prompt {i}" for i in range(30)]
    made = api.evaluate(bundle, texts, out, images_per_prompt=3, batch=2, **SMALL)
    assert len(drawn) == 90 - len(there)
    assert not there.keys() & set(drawn)
    assert {name: (images / name).stat().st_mtime_ns for name in there} == there
    assert sorted(path.name for path in images.iterdir()) == sorted([*there, *drawn])
    assert made.stages[0].images == 90
    record = (out / "model" / "images.jsonl").read_text().splitlines()
    assert len({json.loads(line)["image"] for line in record}) == len(record) == 90


def test_two_workers_draw_what_one_does_and_a_dead_one_is_named(
    bundle: Path, tmp_path: Path
) -> None:
    texts = [f"prompt {i}" for i in range(15)]
    api.evaluate(bundle, texts, tmp_path / "one", images_per_prompt=2, **SMALL)
    killed: list[int] = []

    def kill_one(what: str, share: float) -> None:
        if not killed:
            child = next(
                one
                for one in psutil.Process().children()
                if "sdopt.evaluating.worker" in one.cmdline()
            )
            killed.append(child.pid)
            child.kill()

    options = {"images_per_prompt": 2, "workers": 2, **SMALL}
    with pytest.raises(WorkerError, match=r"worker [01] \(ort\)") as caught:
        api.evaluate(bundle, texts, tmp_path / "two", progress=kill_one, **options)
    assert "SIGKILL" in str(caught.value)
    assert f"process {killed[0]}" in str(caught.value)
    known = json.loads((tmp_path / "two" / "model" / "image_info.json").read_text())
    assert 1 <= sum(len(one["images"]) for one in known) < 30
    # What a killed process had begun to write goes when the run goes on.
    (tmp_path / "two" / "model" / "images" / ".1_0.png.tmp0badcafe").write_bytes(b"half")
    api.evaluate(bundle, texts, tmp_path / "two", **options)
    assert files(tmp_path / "two" / "model") == files(tmp_path / "one" / "model")
    infos = [
        (tmp_path / name / "model" / "image_info.json").read_text() for name in ("one", "two")
    ]
    assert infos[0] == infos[1]


def test_an_error_of_a_worker_is_the_error(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 8") as caught:
        api.evaluate(bundle, ["a", "b"], tmp_path / "out", workers=2, **{**SMALL, "width": 60})
    assert caught.value.hint
    api.evaluate(bundle, ["a", "b"], tmp_path / "out", **SMALL)  # nothing was drawn before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": 3}, "steps was 2, is 3"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"negative": "grey"}, "negative was , is grey"),
        ({"target": "ort:threads=1"}, "target was ort, is ort:threads=1"),
        ({"scheduler": "ddim"}, "scheduler was None, is ddim"),
    ],
)
def test_other_settings_want_another_folder(
    bundle: Path, tmp_path: Path, drawn: list[str], change: dict[str, Any], why: str
) -> None:
    api.evaluate(bundle, ["a"], tmp_path / "out", **SMALL)
    before = files(tmp_path / "out" / "model")
    drawn.clear()
    with pytest.raises(UsageError, match="drawn otherwise") as caught:
        api.evaluate(bundle, ["a", "b"], tmp_path / "out", **{**SMALL, **change})
    assert why in (caught.value.why or "")
    assert drawn == []
    assert files(tmp_path / "out" / "model") == before


def test_another_bundle_or_prompt_wants_another_folder(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "bundle")
    out = tmp_path / "out"
    api.evaluate(made.path, ["a", "b"], out, **SMALL)
    with pytest.raises(UsageError, match="prompt 1 is not what") as caught:
        api.evaluate(made.path, ["a", "c"], out, **SMALL)
    assert "'b', not 'c'" in (caught.value.why or "")

    config = made.path / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "beta_end": 0.02}))
    with pytest.raises(UsageError, match="drawn otherwise"):
        api.evaluate(made.path, ["a"], out, **SMALL)
    config.write_text(text)
    api.evaluate(made.path, ["a"], out, **SMALL)

    graph = made.stage("unet", "model").load()
    half = ir.tensor(np.array(500, np.float32), name="trained")
    graph.graph.initializers["trained"].const_value = half
    with made.lock():
        made.commit(graph, toy.record("unet"))
    with pytest.raises(UsageError, match="drawn otherwise") as caught:
        api.evaluate(made.path, ["a"], out, **SMALL)
    assert "unet was model" in (caught.value.why or "")


def test_one_at_a_time_in_a_folder(bundle: Path, tmp_path: Path) -> None:
    found: list[UsageError] = []

    def meanwhile(what: str, share: float) -> None:
        with pytest.raises(UsageError, match="another sdopt") as caught:
            api.evaluate(bundle, ["a"], tmp_path / "out", **SMALL)
        found.append(caught.value)

    api.evaluate(bundle, ["a"], tmp_path / "out", progress=meanwhile, **SMALL)
    assert found


def test_means_by_hand() -> None:
    found = figures({0: [1.0, 0.0], 1: [0.5, 0.5], 4: [0.2, 0.4]})
    assert (found.prompts, found.images) == (3, 6)
    assert found.score.mean == pytest.approx((0.5 + 0.5 + 0.3) / 3)
    # The sample's deviation of 0.5, 0.5, 0.3 is 0.2 / sqrt(3); over sqrt(3) prompts.
    assert found.score.error == pytest.approx(0.2 / 3)
    assert found.best.mean == pytest.approx((1.0 + 0.5 + 0.4) / 3)
    assert figures({7: [0.25]}).score.error is None
    apart = difference({0: [1.0, 0.5], 1: [0.5]}, {0: [0.5, 0.5], 1: [0.25]})
    assert (apart.mean, apart.error) == (0.25, 0.0)


def test_scores_are_kept_per_scorer_and_image(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def by_length(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        calls.append(len(images))
        return [float(len(text)) for text in texts]

    out = tmp_path / "out"

    def run(scorer: FunctionScorer | None, **options: Any) -> Any:
        return api.evaluate(bundle, prompts, out, scorer=scorer, **options, **SMALL)

    assert run(None).stages[0].score is None
    one = run(scored(by_length)).stages[0]
    assert calls == [4]
    # a handwritten one, two, three, four
    assert one.score.score.mean == (17 + 17 + 19 + 18) / 4
    assert one.categories["odd"].score.mean == 18
    assert one.categories["even"].score.mean == 17.5
    assert one.categories["even"].score.error == pytest.approx(0.5)
    run(scored(by_length))
    assert calls == [4]
    run(scored(by_length), images_per_prompt=2)
    assert calls == [4, 4]
    run(scored(brightness, "1"))
    assert calls == [4, 4]
    (out / "model" / "images" / "0_0.png").unlink()
    again = run(scored(by_length))
    assert calls == [4, 4], "drawn again, it is the same image"
    assert again.stages[0].scores == one.scores
    record = json.loads((out / "evaluation.json").read_text())
    assert record["stages"][0]["score"]["score"]["mean"] == one.score.score.mean
    assert record["stages"][0]["scores"] == one.scores


def test_stages_side_by_side_start_from_the_same_seeds(
    bundle: Path, prompts: Path, tmp_path: Path
) -> None:
    made = api.evaluate(
        bundle,
        prompts,
        tmp_path / "out",
        stages=["model", "other"],
        scorer=scored(brightness),
        **SMALL,
    )
    first, second = made.stages
    assert first.stages["unet"] == "model"
    assert second.stages == {"text_encoder": "model", "unet": "other", "vae_decoder": "model"}
    assert first.scores == second.scores, "it is the same graph"
    assert (first.difference, second.difference.mean) == (None, 0.0)
    assert pages.rows(made)[1][5] == "1.0000"
    with pytest.raises(UnknownNameError, match="othre"):
        api.evaluate(bundle, prompts, tmp_path / "x", stages=["othre"], **SMALL)


def test_the_page_in_a_browser(bundle: Path, tmp_path: Path) -> None:
    evil = '</script><script>document.title = "broken"</script><b>&'
    made = api.evaluate(
        bundle,
        [evil, "b", "c"],
        tmp_path / "out",
        stages=["model", "other"],
        scorer=scored(brightness),
        **SMALL,
    )
    file = tmp_path / "page.html"
    pages.page(made).write(file)
    with opened(file) as browser:
        assert browser.charts() == 2
        assert browser.complaints == []
        assert [one for one in browser.requests if not one.startswith(("file:", "data:"))] == []
        assert browser.page.title() == "Evaluation"
        text = browser.page.inner_text("main")
        assert evil in text
        for one in made.stages:
            assert f"{one.score.score}" in text
        assert browser.page.locator("div.images img").count() == 6
        for one in browser.page.locator("div.images img").all():
            assert one.evaluate("image => image.naturalWidth") == 64


def test_a_scorer_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def half(images, prompts):\n    return [0.5 for one in images]\n")
    made = load_function(f"{file}:half")
    assert made.name == "mine.py:half"
    assert made.score([Image.new("RGB", (4, 4))], ["x"]) == [0.5]
    file.write_text(file.read_text() + "# another\n")
    assert load_function(f"{file}:half").digest != made.digest
    assert load_function("statistics:fmean").name == "statistics:fmean"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("mine.py", "names no function"),
        ("nowhere.py:half", "cannot be imported"),
        ("no.such.module:half", "cannot be imported"),
        ("broken.py:half", "cannot be imported"),
        ("mine.py:whole", "there is no function whole"),
    ],
)
def test_what_is_no_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def half(images, prompts): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=what):
        load_function(text)


@pytest.mark.parametrize(
    "wrong", [lambda i, p: [], lambda i, p: [float("nan")], lambda i, p: [1 / 0], lambda i, p: 3]
)
def test_a_scorer_gives_a_finite_number_per_image(wrong: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="scorer"):
        scored(wrong).score([Image.new("RGB", (4, 4))], ["x"])


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"workers": 2, "device": "cpu,cpu"},
        {"device": "0,1"},
        {"images_per_prompt": 0},
        {"clip": "x", "scorer": "y:z"},
        {"clip": "nowhere"},
        {"seed": -1},
        {"batch": 0},
    ],
)
def test_what_cannot_be(bundle: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        api.evaluate(bundle, ["a"], tmp_path / "out", **{**SMALL, **options})
    assert not (tmp_path / "out").exists()


def test_a_device_each_is_a_worker_each(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which targets the processes get; cards are not needed to see that."""
    from sdopt.evaluating import evaluation

    given: list[Sequence[str]] = []

    def fake(order: Any, tasks: Any, batch: int, targets: Sequence[str]) -> Any:
        given.append(targets)
        return iter(())

    monkeypatch.setattr(evaluation, "draw", fake)
    monkeypatch.setattr(evaluation, "opener", lambda target: toy_target)
    from sdopt.targets.ort import Ort

    toy_target = Ort()
    options = {"target": "ort:provider=cuda", "device": "0,1"}
    api.evaluate(bundle, ["a"], tmp_path / "out", **options, **SMALL)
    assert given == [["ort:provider=cuda", "ort:provider=cuda:device=1"]]
    assert Bundle.open(bundle).components
