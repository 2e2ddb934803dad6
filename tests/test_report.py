"""The page about a bundle, looked at in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from sdopt import api, artifacts, stage_report, units
from sdopt.bundle import RAW, Bundle
from sdopt.errors import MissingDependencyError, SdoptError, UnknownNameError, UsageError
from sdopt.reporting import Options
from sdopt.reporting.gather import gather
from sdopt.reporting.samples import Drawing, psnr
from sdopt.runtime.session import digest_of
from tests import building_bundle
from tests.browser import Opened, launched, opened
from tests.runtime import toy
from tests.test_bundle import make_bundle

EVIL = '</script><script>document.title = "broken"</script><img src=x onerror=alert(1)>&'
SECTIONS = ["Overview", "Passes", "Time and memory", "Numbers", "Sample images"]
QUICK = Drawing(("a handwritten two", f"seven {EVIL}"), steps=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A pipeline with a stage of its own type, one that is stale, and one without a report."""
    made = toy.bundle(tmp_path_factory.mktemp("report") / "toy")
    made.manifest = dataclasses.replace(made.manifest, origin=f"toy {EVIL}")
    made.write_manifest()
    api.optimize(made.path, "clean", seed=7)
    api.optimize(made.path, "cast_fp16:keep=io", stage="half")
    api.optimize(made.path, "clean", source="optimized", stage="late")
    api.optimize(made.path, "clean", components=["unet"], force=True)
    api.optimize(made.path, "cast_fp16:keep=io", components=["unet"])
    return made


@pytest.fixture(scope="module")
def page(whole: Bundle) -> Path:
    file = whole.path.parent / "report.html"
    made = api.report(whole.path, file, Options(drawing=QUICK))
    assert made.notes == ()
    assert made.size_bytes == file.stat().st_size < 5e6
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as one:
        yield one


@pytest.fixture(scope="module")
def seen(page: Path, browser: Browser) -> Iterator[Opened]:
    with opened(page, browser=browser) as one:
        yield one


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of one component, whose passes leave some places alone."""
    made = building_bundle.make(tmp_path_factory.mktemp("part") / "b")
    api.optimize(made.path, "clean,fuse_qkv,tome=9")
    api.optimize(made.path, "cast_fp16:keep=io", stage="half")
    return made


def texts(one: Opened, selector: str) -> list[str]:
    return one.page.locator(selector).all_inner_texts()


def table(one: Opened, head: str) -> dict[str, list[str]]:
    """The rows of the first table with that caption or head, by their first two cells."""
    rows = one.page.locator(f".scroll:has-text('{head}') >> nth=0 >> tbody tr")
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    return {f"{row[0]}@{row[1]}": row for row in cells}


def test_all_of_it_is_there_and_nothing_is_asked_for(seen: Opened) -> None:
    assert texts(seen, "h2") == SECTIONS
    assert texts(seen, "nav a") == SECTIONS
    assert seen.charts() == seen.page.locator("div.chart svg.marks").count() >= 8
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []


def test_names_stay_text(seen: Opened) -> None:
    assert seen.page.title() == "sdopt report: toy"
    assert seen.page.locator("td", has_text=f"toy {EVIL}").count() == 1
    assert seen.page.locator("h3", has_text=f"seven {EVIL}, seed 1").count() == 1
    assert seen.page.locator("img[src=x]").count() == 0


def test_the_lineage_says_what_is_stale_and_why(seen: Opened) -> None:
    marks = seen.page.locator("div.chart >> nth=0").inner_text()
    assert {"unet", "optimized", "late (stale)", "half"} <= set(marks.split("\n"))
    rows = table(seen, "Stages; weights")
    assert rows["unet@late"][-1] == "STALE: its source optimized has changed since"
    assert rows["vae_decoder@late"][-1] == "current"
    assert rows["unet@late"][2] == "optimized"
    assert rows["unet@half"][3:5] == ["cast_fp16:keep=io", "float16"]
    assert "This stage is stale: its source optimized" in seen.page.inner_text("#s2")
    digest = Bundle.open(Path(_bundle_of(seen))).stage("unet", "half").digest
    assert digest in rows["unet@half"]


def _bundle_of(one: Opened) -> str:
    return str(Path(one.page.url.removeprefix("file://")).parent / "toy")


def test_the_commands_are_those_that_were_run(seen: Opened) -> None:
    path = _bundle_of(seen)
    lines = seen.page.locator("pre >> nth=0").inner_text().split("\n")
    late = f"sdopt optimize {path} --passes clean --stage late --from optimized"
    assert late in lines
    assert f"sdopt optimize {path} --passes cast_fp16:keep=io --stage half" in lines
    assert f"sdopt optimize {path} --passes cast_fp16:keep=io --component unet" in lines
    # The raw graphs were committed by hand.
    assert "unet@model" in seen.page.locator("#s1 p.bad").inner_text()
    assert "sdopt optimize --force" in seen.page.locator("#s1 p.bad").inner_text()


def test_passes_are_told_operator_by_operator(seen: Opened, whole: Bundle) -> None:
    stage = whole.stage("unet", "half")
    report = stage_report.find(stage.path, stage.digest).report
    assert report is not None
    (one,) = report.component.passes
    heading = seen.page.locator("h3", has_text="unet, stage half")
    row = heading.locator("xpath=following::tbody[1]/tr").locator("td").all_inner_texts()
    assert row[:4] == ["cast_fp16:keep=io", "lossy", str(one.nodes_before), str(one.nodes_after)]
    ops = heading.locator("xpath=following::details[summary[contains(., 'Counts')]][1]")
    assert ops.locator("summary").inner_text().startswith("Counts of all")
    ops.locator("summary").focus()
    seen.page.keyboard.press("Enter")
    counts = {cells[0]: cells[1:] for cells in _cells(ops.inner_text())}
    wanted = {
        op: [str(one.ops_before.get(op, 0)), str(one.ops_after.get(op, 0))]
        for op in one.op_deltas()
    }
    assert counts == wanted
    assert wanted["Cast"][0] == "0"


def _cells(text: str) -> list[list[str]]:
    rows = [line.split("\t") for line in text.split("\n") if "\t" in line]
    return rows[1:]


def test_time_and_memory_come_from_the_kept_reports(seen: Opened, whole: Bundle) -> None:
    text = seen.page.inner_text("#s3")
    report = stage_report.find(*_place(whole, "vae_decoder", "half")).report
    assert report is not None
    assert report.machine in text
    row = next(line for line in text.split("\n") if line.startswith("vae_decoder@half"))
    assert f"{report.component.bytes_written} B" in row or "kB" in row
    assert report.written[:10] in row
    # Of the process so far, which is large where other tests ran before.
    assert units.size(report.peak_rss_bytes) in row
    assert "no report of theirs is kept: text_encoder@model" in text


def _place(bundle: Bundle, component: str, stage: str) -> tuple[Path, str]:
    one = bundle.stage(component, stage)
    return one.path, one.digest


def test_numbers_are_those_of_compare(seen: Opened, whole: Bundle) -> None:
    path = whole.path
    (wanted,) = api.compare(f"{path}@half", f"{path}@{RAW}", components=["unet"]).components
    row = table(seen, "Each stage against")["unet@half"]
    assert row[2] == wanted.verdict
    assert row[4:6] == ["out_sample", f"{wanted.outputs[0].relative_l2:.2e}"]
    assert table(seen, "Each stage against")["vae_encoder@optimized"][-1] == "equal"
    assert "unet@half: no layer of one has its like in the other" in seen.page.inner_text("#s4")


def test_every_stage_draws_the_same_prompts(seen: Opened) -> None:
    images = seen.page.locator("#s5 img")
    assert images.count() == 2 * 4
    assert images.evaluate_all("all => all.every(one => one.naturalWidth === 128)")
    captions = texts(seen, "#s5 figcaption")
    assert captions[0] == "model"
    assert sum("PSNR" in one for one in captions) >= 2, "half is another type"
    assert all(re.search(r"PSNR \d+\.\d dB|equal to model", one) for one in captions[1:4])


def test_it_is_used_with_the_keyboard_and_on_a_phone(page: Path, browser: Browser) -> None:
    with opened(page, width=390, browser=browser) as one:
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 390
        one.page.keyboard.press("Tab")
        assert one.page.evaluate("document.activeElement.textContent") == "Overview"
        for _ in SECTIONS[1:]:
            one.page.keyboard.press("Tab")
        one.page.keyboard.press("Enter")
        assert one.page.url.endswith("#s5")
        wide = (
            "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        )
        assert one.page.evaluate(f"{wide}.length") > 0
        assert one.page.evaluate(f"{wide}.every(e => e.tabIndex === 0)"), "reached by keys"
        one.page.locator(".scroll").nth(2).focus()
        one.page.keyboard.press("ArrowRight")
        one.page.wait_for_function("document.activeElement.scrollLeft > 0")


def test_a_bundle_without_a_pipeline_shows_what_it_has(
    part: Bundle, tmp_path: Path, browser: Browser
) -> None:
    file = tmp_path / "part.html"
    made = api.report(part.path, file)
    (note,) = made.notes
    assert re.match(r"model, half, optimized: .*model_index\.json", note)
    report = stage_report.find(*_place(part, "unet", "optimized")).report
    assert report is not None
    skips = [skip for one in report.component.passes for skip in one.skips]
    assert skips, "near misses to show"
    with opened(file, browser=browser) as one:
        assert texts(one, "h2") == SECTIONS
        misses = one.page.locator("#s2 details", has_text=skips[0].reason)
        assert not misses.locator("li").first.is_visible(), "folded"
        misses.locator("summary").click()
        assert skips[0].where in misses.inner_text()
        assert re.search(r"\w+ \d+/\d+", one.page.inner_text("#s2 table"))
        charts = texts(one, "#s4 div.chart")
        assert any("unet@half: error by depth" in text for text in charts)
        assert "unet@half: every layer within" in one.page.inner_text("#s4")
        assert one.page.locator("#s5 img").count() == 0
        assert "Not drawn here" in one.page.inner_text("#s5")
        assert one.complaints == []


def test_a_forged_report_is_text_or_nothing(
    part: Bundle, tmp_path: Path, browser: Browser
) -> None:
    shutil.copytree(part.path, tmp_path / "b")
    path, digest = _place(Bundle.open(tmp_path / "b"), "unet", "optimized")
    report = stage_report.find(path, digest).report
    assert report is not None
    data = report.to_json()
    first = data["component"]["passes"][0]
    first |= {"spec": EVIL, "notes": [EVIL], "ops_after": {EVIL: 3}, "rewrites": {EVIL: 1}}
    first["skips"] = [{"reason": EVIL, "where": EVIL, "kind": "x"}]
    data |= {"machine": EVIL, "written": EVIL, "command": ["optimize", EVIL], "verb": EVIL}
    stage_report.path_of(path).write_text(json.dumps(data))
    file = tmp_path / "forged.html"
    api.report(tmp_path / "b", file, Options(images=False, compare=False))
    with opened(file, browser=browser) as one:
        assert one.page.title() == "sdopt report: b"
        assert one.page.locator("img").count() == 0
        assert EVIL in one.page.locator("pre").inner_text().replace("'", "")
        assert one.complaints == []
        assert texts(one, "h2") == SECTIONS[:3], "what was not asked for is not there"
    data["component"]["digest"] = "0" * 16
    stage_report.path_of(path).write_text(json.dumps(data))
    api.report(tmp_path / "b", file, Options(images=False, compare=False))
    assert EVIL not in file.read_text().replace("&lt;", "<")
    assert "is of what the stage was before" in file.read_text()


def test_what_cannot_run_here_is_said(part: Bundle, tmp_path: Path, browser: Browser) -> None:
    shutil.copytree(part.path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    path, _ = _place(bundle, "unet", "optimized")
    model = bundle.stage("unet", "optimized").load()
    node = next(iter(model.graph))
    node.op_type = "OfAnotherMachine"
    with bundle.lock():
        record = bundle.stage("unet", "optimized").record
        bundle.commit(model, dataclasses.replace(record, stage="trt_fp16"))
    plan = path.with_name("trt_fp16.plan")
    made = tmp_path / "made"
    made.write_bytes(b"engine")
    facts = {"attentions": 4, "attentions_fused": 3, "layers": EVIL}
    artifacts.commit(made, plan, "key", 12.5, {"tensorrt": "10.9"}, facts)
    file = tmp_path / "there.html"
    written = api.report(tmp_path / "b", file, Options(images=False))
    (note,) = written.notes
    assert note.startswith("unet@trt_fp16: onnxruntime cannot load")
    with opened(file, browser=browser) as one:
        assert "Not computed here: unet@trt_fp16" in one.page.inner_text("#s4")
        row = table(one, "attentions fused")["unet/trt_fp16.plan@unet@trt_fp16"]
        assert row[2:] == ["6 B", "12.5 s", "3 of 4", "tensorrt 10.9"]
        assert "not run by this page" in one.page.inner_text("#s3")
        assert "trt_fp16.plan" in one.page.locator("div.chart >> nth=0").inner_text()
        assert one.page.title() == "sdopt report: b"


def test_only_what_was_asked_for_is_shown(whole: Bundle, tmp_path: Path, browser: Browser) -> None:
    file = tmp_path / "few.html"
    api.report(
        whole.path,
        file,
        Options(components=["unet"], stages=["half"], drawing=Drawing(("two",), 1)),
    )
    with opened(file, browser=browser) as one:
        rows = table(one, "Each stage against")
        assert list(rows) == ["unet@half"]
        assert [name for name in texts(one, "#s2 h3") if name] == ["unet, stage half"]
        assert len(texts(one, "#s5 figcaption")) == 2
        assert "those left out of this page ran too" in one.page.inner_text("#s5")


@pytest.fixture(scope="module")
def benched(whole: Bundle) -> Path:
    """The JSON of a real, short benchmark."""
    found = api.bench(
        whole.path,
        stages=["model", "half"],
        components=["unet"],
        rounds=3,
        warm_up=1,
        memory=False,
    )
    file = whole.path.parent / "bench.json"
    file.write_text(json.dumps(found.to_json()))
    return file


def test_a_benchmark_is_shown_with_what_has_changed_since(
    whole: Bundle, benched: Path, tmp_path: Path, browser: Browser
) -> None:
    data = json.loads(benched.read_text())
    data["rows"][1]["digests"]["unet"] = "0" * 16
    data["origin"], data["notes"] = EVIL, [EVIL]
    changed, file = tmp_path / "bench.json", tmp_path / "page.html"
    changed.write_text(json.dumps(data))
    api.report(whole.path, file, Options(images=False, compare=False, benchmark=changed))
    with opened(file, browser=browser) as one:
        assert texts(one, "h2")[-1] == "Benchmark"
        rows = table(one, "target")
        states = [cells[-1] for cells in rows.values()]
        assert states == [
            "of the stages as they are",
            "STALE: not the unet that the bundle holds now",
        ]
        assert f"{data['components'][0]['rows'][0]['spread']['p50']:.4g}" in one.page.inner_text(
            "#s4"
        )
        assert any("unet: ms per call" in text for text in texts(one, "#s4 div.chart"))
        assert one.page.title() == "sdopt report: toy"
        assert one.complaints == []
    for text in ("{", "[]", "{}", '{"kind": "bench", "schema": 1}'):
        changed.write_text(text)
        with pytest.raises(UsageError, match=r"no JSON of sdopt bench|no report|not whole"):
            api.report(whole.path, file, Options(benchmark=changed))


def evaluation(folder: Path, bundle: Bundle) -> Path:
    """What ``sdopt eval`` leaves, as far as the page reads it."""
    stages = {}
    for name in ("half", "optimized"):
        stages[name] = {part: bundle.stage(part, name) for part in ("text_encoder", "unet")}
        (folder / name / "images").mkdir(parents=True)
        for index in (3, 9):
            image = Image.new("RGB", (8, 8), "red")
            image.save(folder / name / "images" / f"{index}_0.png")

    def figures(mean: float, error: float | None) -> dict[str, object]:
        return {"score": {"mean": mean, "error": error}}

    data = {
        "schema": 1,
        "scorer": f"clip {EVIL}",
        "prompts": [{"index": 3, "text": f"a cat {EVIL}"}, {"index": 9, "text": "a dog"}],
        "stages": [
            {
                "stage": name,
                "stages": {part: one.name for part, one in parts.items()},
                "bundle": digest_of(parts) if name == "half" else "0" * 16,
                "images": 2,
                "score": figures(0.25, 0.5) if name == "half" else None,
                "categories": {"animals": figures(0.25, None)} if name == "half" else {},
            }
            for name, parts in stages.items()
        ],
    }
    (folder / "evaluation.json").write_text(json.dumps(data))
    return folder


def test_an_evaluation_is_shown_with_what_has_changed_since(
    whole: Bundle, tmp_path: Path, browser: Browser
) -> None:
    folder, file = evaluation(tmp_path / "eval", whole), tmp_path / "page.html"
    quick = Options(images=False, compare=False, evaluation=folder)
    api.report(whole.path, file, quick)
    with opened(file, browser=browser) as one:
        assert texts(one, "h2")[-1] == "Evaluation"
        rows = table(one, "standard error")
        assert rows["half@2"][2:] == ["0.2500", "0.5000", "of the stages as they are"]
        assert rows["optimized@2"][2] == "not scored"
        assert rows["optimized@2"][4].startswith("STALE")
        assert texts(one, "#s4 h3") == [f"a cat {EVIL}", "a dog"]
        assert (
            texts(one, "#s4 figcaption")
            == ["Mean over the prompts of each category."]
            + [
                "half",
                "optimized",
            ]
            * 2
        )
        assert one.complaints == []
    result = folder / "evaluation.json"
    for text in ("{", '{"schema": 1}', result.read_text().replace('"half"', '"../half"')):
        result.write_text(text)
        with pytest.raises(SdoptError, match="cannot be read"):
            api.report(whole.path, file, quick)
    result.unlink()
    with pytest.raises(UsageError, match="no evaluation here"):
        api.report(whole.path, file, quick)


def test_staleness_is_passed_on(whole: Bundle, tmp_path: Path) -> None:
    shutil.copytree(whole.path, tmp_path / "b")
    api.optimize(tmp_path / "b", "clean", source="late", stage="later", components=["unet"])
    found = gather(Bundle.open(tmp_path / "b"), ["unet"], None)
    states = {one.name: one.outdated for one in found.lineage}
    assert states["later"] == "its source late is stale itself"
    assert states["half"] == ""
    (tmp_path / "b" / "unet" / "late.onnx").unlink()
    states = {
        one.name: one.outdated for one in gather(Bundle.open(tmp_path / "b"), None, None).lineage
    }
    assert states["later"] == "" or "gone" in states["later"]
    unet = gather(Bundle.open(tmp_path / "b"), ["unet"], None).lineage
    assert next(one.outdated for one in unet if one.name == "later") == "its source late is gone"


def test_stages_made_from_each_other_in_turn_end(tmp_path: Path, browser: Browser) -> None:
    made = make_bundle(tmp_path / "b")
    api.optimize(made.path, "clean", stage="a")
    api.optimize(made.path, "clean", source="a", stage="b")
    api.optimize(made.path, "clean", source="b", stage="a")
    states = {one.name: one.outdated for one in gather(made, None, None).lineage}
    assert states == {
        "model": "",
        "a": "its source b is stale itself",
        "b": "its source a has changed since",
    }
    file = tmp_path / "round.html"
    api.report(made.path, file, Options(images=False, compare=False))
    with opened(file, browser=browser) as one:
        assert {"a (stale)", "b (stale)"} <= set(texts(one, "div.chart")[0].split("\n"))
        assert one.complaints == []


def test_wrong_questions_are_refused_before_anything_is_computed(
    whole: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="no component has a stage 'hlaf'") as caught:
        api.report(whole.path, tmp_path / "x.html", Options(stages=["hlaf"]))
    assert "half" in str(caught.value)
    with pytest.raises(UnknownNameError, match="no component 'unett'"):
        api.report(whole.path, tmp_path / "x.html", Options(components=["unett"]))
    with pytest.raises(UsageError, match="cannot be written there"):
        api.report(whole.path, tmp_path / "nowhere" / "x.html")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingDependencyError, match=r"sdopt\[report\]"):
        api.report(whole.path, tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_psnr_by_hand() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    grey = np.full((2, 2, 3), 51, np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(grey, black) == pytest.approx(20 * math.log10(5))
