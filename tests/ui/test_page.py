"""The page in a real browser: from an upload to images, cancelled, reloaded, and attacked."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from sdopt import api
from tests.browser import browsing, launched

ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT / "examples" / "digits"
LONG = 120_000
"""Milliseconds that a job may take on a busy machine."""

expect.set_options(timeout=30_000)  # the machine of the tests has other things to do

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The server of a root as users start it; gives its address."""
    command = [sys.executable, "-m", "sdopt", "ui", "--root", str(root), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), "it did not start"
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    command = [sys.executable, str(DIGITS / "single_file.py"), "-o", str(file)]
    subprocess.run(command, check=True, cwd=ROOT)
    return file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a bundle that is exported already."""
    found = tmp_path_factory.mktemp("root")
    api.export(DIGITS, found / "digits", dtype="fp32")
    return found


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with serving(root) as found:
        yield found


def come(page: Page, address: str) -> None:
    """Open the page and wait until it has asked for what it shows."""
    page.goto(address)
    expect(page.locator("#panel section, #panel p.quiet")).to_be_visible(timeout=LONG)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def ended(page: Page, title: str, state: str = "done") -> None:
    """Wait until the job with this title is over, and see how."""
    panel = page.locator("#panel")
    expect(panel.locator("h3")).to_contain_text(title, timeout=LONG)
    over = panel.locator("section.done, section.failed, section.cancelled")
    expect(over).to_be_visible(timeout=LONG)
    said = panel.inner_text()
    assert panel.locator(f"section.{state}").count() == 1, said


def choose(page: Page, label: str, option: str) -> None:
    """Choose from a dropdown."""
    page.get_by_label(label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option, exact=True).last.click()  # the list that opened last


def try_merging(page: Page) -> None:
    """A dry run of the recipe with three merged self-attentions."""
    page.get_by_role("checkbox", name=re.compile("tome: ")).check()
    page.get_by_label("tome: blocks").fill("3")
    expect(page.get_by_label("Recipe")).to_have_value(re.compile("tome=3"))
    press(page, "Dry run")
    ended(page, "dry run optimized")


def draw_beside_raw(page: Page, steps: int) -> None:
    """Draw two prompts by the build and by the raw graph."""
    tab(page, "Draw")
    page.locator("#prompt textarea").fill("a handwritten seven\na handwritten two")
    page.get_by_label("Steps").locator("visible=true").fill(str(steps))
    page.get_by_label("Guidance scale").locator("visible=true").fill("2")
    choose(page, "Runs", "ort_cpu")
    choose(page, "Draw the same by", "model")
    press(page, "Draw")
    ended(page, "draw a handwritten seven")


def drawn(page: Page, selector: str) -> list[tuple[int, int]]:
    """The sizes of images, as the browser decoded them."""
    script = "all => all.map(one => [one.naturalWidth, one.naturalHeight])"
    return [tuple(size) for size in page.locator(selector).evaluate_all(script)]


def test_from_a_single_file_to_images(checkpoint: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as address, browsing() as opened:
        page = opened.page
        come(page, address)

        tab(page, "Upload")
        page.locator("#upload input[type=file]").set_input_files(checkpoint)
        expect(page.locator("#notice")).to_contain_text("uploads/tiny.safetensors")
        assert (tmp_path / "uploads" / "tiny.safetensors").read_bytes() == checkpoint.read_bytes()
        expect(page.locator("#about-source")).to_contain_text("sd1")
        expect(page.get_by_label("Name of the model")).to_have_value("tiny")
        press(page, "Export to ONNX")
        # In the middle the page is loaded anew: what it shows comes from the server.
        expect(page.locator("#panel section.running")).to_be_visible(timeout=LONG)
        come(page, address)
        opened.complaints.clear()  # of what the page was asking when it was left
        ended(page, "export tiny.safetensors")
        expect(page.get_by_label("Model", exact=True)).to_have_value("tiny")
        assert (tmp_path / "tiny" / "unet" / "model.onnx").is_file()

        tab(page, "2 Recipe")
        try_merging(page)
        expect(page.locator("#panel")).to_contain_text("self_attention 3/")
        expect(page.locator("#panel figure img").first).to_be_visible()
        assert not (tmp_path / "tiny" / "unet" / "optimized.onnx").exists()
        press(page, "Optimize and build")
        ended(page, "optimize optimized, build ort")
        assert (tmp_path / "tiny" / "unet" / "ort_cpu.onnx").is_file()

        draw_beside_raw(page, 4)
        shown = page.locator("#images .thumbnail-item img, #images .grid-container img")
        expect(shown).to_have_count(4, timeout=LONG)
        assert drawn(page, "#images img") == [(128, 128)] * 4
        expect(page.locator("#ab img").first).to_be_visible()
        images = sorted((tmp_path / "tiny" / ".jobs").glob("*/images/*.png"))
        assert len(images) == 4
        assert "seven" in Image.open(images[0]).text["prompt"]

        tab(page, "Image to image")
        page.locator("#start-image input[type=file]").set_input_files(images[0])
        expect(page.locator("#start-image img")).to_be_visible()
        page.locator("#prompt textarea").fill("a handwritten nine")
        choose(page, "Draw the same by", "none")
        press(page, "Draw")
        ended(page, "draw a handwritten nine")
        expect(shown).to_have_count(1, timeout=LONG)

        tab(page, "Look")
        press(page, "Make the report")
        ended(page, "report")
        frame = page.frame_locator("#report iframe")
        expect(frame.locator("div.chart[data-drawn=yes]").first).to_be_visible(timeout=LONG)
        expect(frame.locator("body")).to_contain_text("tome=3")
        hosts = {url.split("/")[2] for url in opened.requests if url.startswith("http")}
        assert hosts == {address.split("/")[2]}, "the page asked another server"
        # What gradio 6.31 says itself after an upload.
        assert set(opened.complaints) <= {"Method not implemented."}


def test_a_running_job_is_cancelled_and_one_that_fails_says_what_to_do(address: str) -> None:
    with browsing() as opened:
        page = opened.page
        come(page, address)
        tab(page, "Draw")
        page.locator("#prompt textarea").fill("a handwritten one")
        page.get_by_label("Images per prompt").fill("500")
        press(page, "Draw")
        expect(page.locator("#panel section.running")).to_be_visible(timeout=LONG)
        press(page, "Cancel")
        ended(page, "draw a handwritten one", "cancelled")

        page.locator("#prompt textarea").fill("a handwritten four")
        page.get_by_label("Images per prompt").fill("1")
        page.get_by_label("Height in pixels").fill("13")
        press(page, "Draw")
        ended(page, "draw a handwritten four", "failed")
        expect(page.get_by_role("alert")).to_contain_text("multiple of 8")


def test_what_was_built_is_downloaded_as_a_zip(address: str, root: Path) -> None:
    with browsing() as opened:
        page = opened.page
        come(page, address)
        tab(page, "2 Recipe")
        page.get_by_label("Emit only").check()
        press(page, "Build")
        ended(page, "build ort")
        choose(page, "To download", "build-ort_cpu")
        press(page, "Make a zip")
        with page.expect_download() as found:
            page.locator("#download a").click()
        with zipfile.ZipFile(found.value.path()) as archive:
            names = archive.namelist()
    assert {"build-ort_cpu.md", "unet/ort_cpu.onnx"} <= set(names)
    assert all((root / "digits" / name).is_file() for name in names)


HOSTILE = ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "x\\..\\y", ".hidden", "-"]


def test_no_name_leads_out_of_the_root(address: str, root: Path) -> None:
    before = set(root.parent.iterdir())
    with browsing() as opened:
        page = opened.page
        come(page, address)
        for name in HOSTILE:
            page.get_by_label("Name of the model").fill(name)
            press(page, "Export to ONNX")
            expect(page.locator("#notice [role=alert]")).to_be_visible()
            come(page, address)
        tab(page, "2 Recipe")
        for recipe in ("lora=/etc/passwd", 'lora="../../etc/passwd"', "graphsurgeon=os.system"):
            page.get_by_label("Recipe").fill(recipe)
            press(page, "Optimize")
            expect(page.locator("#notice [role=alert]")).to_be_visible()
            come(page, address)
            tab(page, "2 Recipe")
        page.get_by_label("Name of the stage").fill("../../x")
        press(page, "Optimize")
        ended(page, "optimize ../../x", "failed")
    assert set(root.parent.iterdir()) == before


def test_an_idle_page_asks_for_nothing(address: str) -> None:
    with browsing() as opened:
        come(opened.page, address)
        expect(opened.page.locator("#panel section.running")).to_have_count(0, timeout=LONG)
        opened.page.wait_for_timeout(1500)
        before = len(opened.requests)
        opened.page.wait_for_timeout(4000)
        assert opened.requests[before:] == []


UNLABELLED = """
() => [...document.querySelectorAll('input, textarea, select, button, [role=tab]')]
  .filter(one => one.offsetParent !== null && one.type !== 'hidden')
  .filter(one => !(one.labels && [...one.labels].some(label => label.innerText.trim()))
    && !one.innerText.trim() && !one.getAttribute('aria-label') && !one.title
    && !one.getAttribute('aria-labelledby'))
  .map(one => one.outerHTML.slice(0, 160))
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_control_has_a_label_and_nothing_is_wider_than_the_page(
    address: str, width: int
) -> None:
    with browsing(width) as opened:
        page = opened.page
        come(page, address)
        for name in ("1 Source", "2 Recipe", "Look", "Draw"):
            tab(page, name)
            page.wait_for_timeout(300)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} pixels wide"
            assert page.evaluate(UNLABELLED) == []


def test_the_keyboard_is_enough(address: str) -> None:
    with browsing() as opened:
        page = opened.page
        come(page, address)
        page.get_by_role("tab", name="1 Source", exact=True).focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Recipe")).to_be_visible()
        page.get_by_role("checkbox", name=re.compile("hoist: ")).focus()
        page.keyboard.press("Space")
        expect(page.get_by_label("Recipe")).to_have_value(re.compile("hoist"))


def test_a_reader_of_chinese_reads_chinese(address: str) -> None:
    with launched() as browser:
        page = browser.new_context(locale="zh-CN").new_page()
        page.goto(address)
        expect(page.get_by_role("tab", name="2 配方")).to_be_visible(timeout=LONG)
        expect(page.get_by_label("模型名称")).to_be_visible()
        expect(page.locator("#panel")).to_contain_text(re.compile("[\u4e00-\u9fff]"), timeout=LONG)
