"""What the page's forms mean: toggles and recipes, calls, packages, and how a job is shown."""

from __future__ import annotations

import hashlib
import re
import string
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdopt import api, registry
from sdopt.errors import PathError, SdoptError, SpecError, UnknownNameError, UsageError
from sdopt.pipeline import Pipeline
from sdopt.ui import packages, recipes, requests, strings
from sdopt.ui.jobs import Call, Event, JobError, JobQueue, JobView, State
from sdopt.ui.shown import job_html, link_html, notice_html
from sdopt.ui.workspace import Workspace
from tests.ui.file_server import Hosted, hosting

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits"
FAST = "clean,raise_ops,clean,fuse_qkv,pad_align"
TOGGLES = {one.name: one for one in recipes.toggles()}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_every_pass_is_a_toggle_but_the_one_that_runs_code() -> None:
    assert set(TOGGLES) == set(registry.table("passes")) - {"graphsurgeon"}
    assert all(one.summary and one.numerics for one in TOGGLES.values())


def test_a_preset_is_written_out() -> None:
    assert recipes.expanded("@fast,tome=3") == f"{FAST},tome=3"
    assert recipes.names(FAST) == ["clean", "raise_ops", "fuse_qkv", "pad_align"]


@pytest.mark.parametrize(
    ("text", "chosen", "made"),
    [
        (FAST, ["clean", "raise_ops", "fuse_qkv", "pad_align", "tome"], f"{FAST},tome"),
        (FAST, ["clean", "fuse_qkv"], "clean,clean,fuse_qkv"),
        ("tome=3:ratio=0.4,cast_fp16", ["tome", "cast_fp16"], "tome=3:ratio=0.4,cast_fp16"),
        ("cast_fp16", ["cast_fp16", "fuse_qkv"], "fuse_qkv,cast_fp16"),
        ("", ["hoist"], "hoist"),
        ("tome=3", [], ""),
    ],
)
def test_a_toggle_leaves_what_stays_and_puts_a_new_pass_where_it_may_stand(
    text: str, chosen: list[str], made: str
) -> None:
    assert recipes.toggled(text, chosen) == made


def test_options_go_into_the_recipe_and_come_out_of_it() -> None:
    tome = TOGGLES["tome"]
    text = recipes.with_option(f"{FAST},tome", tome, "blocks", "3")
    assert text == f"{FAST},tome=3"
    text = recipes.with_option(text, tome, "ratio", "0.4")
    assert text == f"{FAST},tome=3:ratio=0.4"
    assert recipes.values(text, tome) == {"blocks": "3", "ratio": "0.4"}
    assert recipes.with_option(text, tome, "ratio", " ") == f"{FAST},tome=3"
    text = recipes.with_option("cast_fp16", TOGGLES["cast_fp16"], "keep", "io + mid_block")
    assert str(Pipeline.parse(text)) == "cast_fp16:keep=io+mid_block"


@pytest.mark.parametrize("name", sorted(TOGGLES))
def test_every_option_of_every_pass_can_be_set(name: str) -> None:
    for option in TOGGLES[name].options:
        text = recipes.with_option(name, TOGGLES[name], option.name, "1")
        assert recipes.values(text, TOGGLES[name]) == {option.name: "1"}


def test_scales_belong_to_loras_in_order(workspace: Workspace) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (workspace.root / name).touch()
    names = ["a.safetensors", "b.safetensors"]
    found = requests.loras(workspace, names, "0.5")
    assert found == ["a.safetensors:0.5", "b.safetensors:1"]
    with pytest.raises(UsageError, match="3 scales for 2"):
        requests.loras(workspace, names, "1,1,1")
    with pytest.raises(UsageError, match="no number"):
        requests.loras(workspace, names, "much")
    with pytest.raises(PathError):
        requests.loras(workspace, ["../a.safetensors"], "")


def test_an_export_is_of_what_lies_below_the_root(workspace: Workspace) -> None:
    (workspace.root / "model.safetensors").touch()
    call = requests.export(workspace, "model.safetensors", "model", dtype="fp16")
    assert call.arguments == {
        "source": "model.safetensors",
        "output": "model",
        "lora": [],
        "dtype": "fp16",
    }
    for source in ("org/name", "/etc", "../x", "https://example.org/x"):
        with pytest.raises(PathError):
            requests.export(workspace, source, "model")
    with pytest.raises(PathError):
        requests.export(workspace, "model.safetensors", "model", supplied={"vae": "/etc"})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", UsageError),
        ("nothing", UnknownNameError),
        ("tome", SpecError),
        ("lora=/etc/passwd", PathError),
        ("quantize=int8:data=../elsewhere", PathError),
        ("graphsurgeon=os.system", UsageError),
        ("list.recipe", UsageError),
    ],
)
def test_a_recipe_that_may_not_run_is_refused(
    workspace: Workspace, text: str, kind: type[SdoptError]
) -> None:
    with pytest.raises(kind):
        requests.optimize(workspace, "model", text, stage="optimized")


def test_a_build_has_its_options_on_every_target(workspace: Workspace) -> None:
    call = requests.build(
        workspace,
        "model",
        ["ort", "trt"],
        precision="fp16",
        shapes=" 512x512 ",
        batch="1..4",
        source="fast",
        emit_only=True,
    )
    assert call.arguments["targets"] == ["ort:dtype=fp16", "trt:dtype=fp16"]
    assert call.arguments["batch"] == [1, 4]
    assert call.arguments["shapes"] == "512x512"
    assert call.arguments["source"] == "fast"
    for bad in ({"shapes": "many"}, {"batch": "x"}, {"precision": "fp7"}, {"options": "no=1"}):
        with pytest.raises(SdoptError):
            requests.build(workspace, "model", ["ort"], **bad)
    with pytest.raises(UsageError, match="runs code"):
        requests.build(workspace, "model", ["tpu"], options="python=sh")


def test_what_is_drawn_is_said_in_full(workspace: Workspace) -> None:
    drawing = requests.Drawing(" one \n\ntwo", steps=4, seed=3, height=0, scheduler="")
    call = drawing.call(workspace, "model", "stage:fast")
    assert call.arguments["prompts"] == ["one", "two"]
    assert call.arguments["height"] is None
    assert call.arguments["scheduler"] is None
    assert call.arguments["stage"] == "fast"
    assert "strength" not in call.arguments
    assert drawing.call(workspace, "model", "target:ort").arguments["target"] == "ort"
    with pytest.raises(UsageError, match="what to draw"):
        requests.Drawing(" \n").call(workspace, "model", "")


def test_a_picture_outlives_the_browser_that_sent_it(workspace: Workspace) -> None:
    sent = workspace.incoming / "x" / "start.png"
    sent.parent.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(sent)
    kept = workspace.keep_picture(sent)
    workspace.sweep(0)
    assert not sent.exists()
    assert (workspace.root / kept).is_file()
    with pytest.raises(PathError):
        workspace.keep_picture(Path("/etc/passwd"))


def test_an_emit_only_package_is_a_zip_of_what_it_says_to_copy(workspace: Workspace) -> None:
    bundle = api.export(DIGITS, workspace.root / "digits", components=["vae_decoder"]).bundle
    api.build(bundle, "atc:soc=Ascend310P3", shapes="64x64", emit_only=True)
    from sdopt.bundle import Bundle

    opened = Bundle.open(bundle)
    (name,) = packages.offered(opened)
    path = packages.zipped(workspace, opened, name)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    assert {f"{name}.md", f"{name}.sh"} <= set(names)
    assert any(one.startswith("vae_decoder/") and one.endswith(".onnx") for one in names)
    assert all((opened.path / one).is_file() for one in names)
    assert f'href="/files/{path.name}"' in link_html(path, "Download")
    with pytest.raises(UnknownNameError):
        packages.files(opened, "../../etc/passwd")


def _view(**changes: object) -> JobView:
    base = {
        "id": "20261125-000000-000000",
        "bundle": "model",
        "title": "optimize",
        "state": State.RUNNING,
        "calls": (Call("optimize"),),
        "queued": 0.0,
        "started": 0.0,
        "ended": 1.5,
    }
    return JobView(**{**base, **changes})  # type: ignore[arg-type]


HOSTILE = "<img src=x onerror=alert(1)>"


def test_a_job_is_shown_and_nothing_in_it_is_markup() -> None:
    error = JobError(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    events = (Event(0.0, 0, HOSTILE, 0.1), Event(0.1, 0, HOSTILE, 0.5))
    view = _view(
        state=State.FAILED, title=HOSTILE, bundle=HOSTILE, error=error, log=HOSTILE, events=events
    )
    for language in strings.LANGUAGES:
        text = job_html(view, language)
        assert "<img" not in text
        assert text.count("&lt;img") >= 8
    assert "<img" not in notice_html(HOSTILE)
    assert "<img" not in notice_html("", UsageError(HOSTILE, where=HOSTILE, hint=HOSTILE))


def test_progress_is_a_bar_and_events_are_told_once() -> None:
    events = tuple(Event(index / 10, 0, "tome=3", index / 10) for index in range(5))
    text = job_html(_view(what="tome=3", share=0.25, events=events))
    assert 'value="0.250"' in text
    assert "Steps so far: 1" in text
    assert "No job yet" in job_html(None)


def test_what_passes_did_is_shown_with_its_chart_and_reasons(tmp_path: Path) -> None:
    bundle = api.export(DIGITS, tmp_path / "digits", components=["vae_decoder"]).bundle
    report = api.optimize(bundle, "clean,fuse_qkv", dry_run=True).to_json()
    report["components"][0]["passes"][1]["skips"] = [
        {"reason": "another input", "where": "mid_block", "kind": ""}
    ]
    text = job_html(_view(state=State.DONE, results=(report,)))
    assert 'src="data:image/png;base64,' in text
    assert "fuse_qkv: another input (mid_block)" in text
    assert "self_attention_qkv 1/1" in text


def test_every_text_has_both_languages_and_the_same_blanks() -> None:
    for key, (english, chinese) in strings.STRINGS.items():
        assert english.strip()
        assert chinese.strip()
        blanks = [
            {f for _, f, _, _ in string.Formatter().parse(t) if f} for t in (english, chinese)
        ]
        assert blanks[0] == blanks[1], key


def test_every_text_is_used_and_every_used_text_is_there() -> None:
    folder = Path(strings.__file__).parent
    files = [path for path in folder.iterdir() if path.suffix in (".py", ".jinja")]
    source = "".join(path.read_text("utf-8") for path in files if path.name != "strings.py")
    source = source.replace("'", '"')
    used = set(re.findall(r"""(?:texts|say)\(\s*"(\w+)\"""", source))
    assert used <= set(strings.STRINGS)
    unused = {key for key in strings.STRINGS if f'"{key}"' not in source}
    assert unused - {str(state) for state in State} == set()


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        (None, "en"),
        ("", "en"),
    ],
)
def test_the_language_is_the_browsers(header: str | None, language: str) -> None:
    assert strings.language_of(header) == language


def test_a_download_is_a_job_like_any_other(workspace: Workspace) -> None:
    content = (DIGITS / "next.safetensors").read_bytes()
    queue = JobQueue(workspace.root)
    queue.start()
    try:
        with hosting(Hosted(content)) as hosted:
            url = hosted.url
            sha256 = hashlib.sha256(content).hexdigest()
            call = requests.fetch(
                url, "uploads", limit_bytes=10**9, sha256=sha256, allow_private=True
            )
            ids = [queue.submit("uploads", "fetch", [call])]
            refused = requests.fetch(url, "uploads", limit_bytes=10**9)
            ids.append(queue.submit("uploads", "fetch", [refused]))
            deadline = time.monotonic() + 120
            while queue.busy():
                assert time.monotonic() < deadline
                time.sleep(0.1)
        done, failed = map(queue.job, ids)
    finally:
        queue.close()
    assert done.state is State.DONE, done.error
    (result,) = done.results
    assert (workspace.root / result["file"]).read_bytes() == content
    assert [one.name for one in workspace.adapters()] == [result["file"]]
    assert failed.state is State.FAILED
    assert failed.error is not None
    assert "--allow-private-urls" in (failed.error.hint or "")
