"""The pictures of pages in docs/images, made anew: ``python -m tests.screenshots [report|ui]``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect

from tests.browser import browsing, opened
from tests.ui.test_page import come, draw_beside_raw, ended, press, serving, tab, try_merging

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, TALL, NARROW = 1280, 900, 1400, 390
PART = """
#s1 > :not(h2, figure), #s3 > :not(h2, figure) { display: none; }
#s4 > details, #s4 > figure:first-of-type, #s4 > figure:nth-of-type(n+3) { display: none; }
main section { margin-bottom: -1rem; }
"""
"""Hides lists and all but a chart of each kind, for a picture that fits a page."""
STAGE = """
for (const head of document.querySelectorAll("#s2 h3"))
  if (head.textContent !== "unet, stage tome5")
    for (let one = head; one && (one === head || one.tagName !== "H3"); one = one.nextSibling)
      if (one.style) one.style.display = "none";
"""
"""Of the passes the stage that tells most."""


def sdopt(*words: str) -> None:
    """A process each, so that the page's peak RSS is that of a verb."""
    subprocess.run([sys.executable, "-m", "sdopt", *words], check=True)


def report() -> None:
    """``report.png``: the page of the digits bundle, most of its stages left out."""
    Path("examples").symlink_to(ROOT / "examples")
    sdopt("export", "examples/digits", "-o", "bundle", "--dtype", "fp32")
    sdopt("optimize", "bundle", "--passes", "@fast")
    sdopt("optimize", "bundle", "--passes", "@fast,tome=5", "--stage", "tome5")
    sdopt("build", "bundle", "--target", "ort")
    sdopt("report", "bundle", "-o", "report.html", "--component", "unet", "--steps", "10")
    with opened(Path("report.html"), WIDTH, HEIGHT) as one:
        one.page.add_style_tag(content=PART)
        one.page.evaluate(STAGE)
        one.page.screenshot(path=IMAGES / "report.png", full_page=True, scale="css")


def ui() -> None:
    """``ui-*.png``: the page over the digits model, after a dry run and after drawing."""
    Path("examples").unlink(missing_ok=True)
    Path("examples").symlink_to(ROOT / "examples")
    root = Path("root").absolute()
    root.mkdir()
    sdopt("export", "examples/digits", "-o", "root/digits", "--dtype", "fp32")
    with serving(root) as address, browsing(WIDTH, HEIGHT) as one:
        page = one.page
        come(page, address)
        tab(page, "2 Recipe")
        try_merging(page)
        page.set_viewport_size({"width": WIDTH, "height": TALL})
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=IMAGES / "ui-recipe.png", scale="css")
        press(page, "Optimize and build")
        ended(page, "optimize optimized, build ort")
        draw_beside_raw(page, 10)
        expect(page.locator("#ab img").first).to_be_visible()
        page.wait_for_timeout(1000)
        page.screenshot(path=IMAGES / "ui-draw.png", full_page=True, scale="css")
        page.set_viewport_size({"width": NARROW, "height": HEIGHT})
        page.wait_for_timeout(500)
        page.screenshot(path=IMAGES / "ui-narrow.png", scale="css")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.chdir(folder)
        for name, make in (("report", report), ("ui", ui)):
            if not sys.argv[1:] or name in sys.argv[1:]:
                make()
