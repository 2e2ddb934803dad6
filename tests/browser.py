"""A real browser without a display, for what must be looked at: pages and their charts.

``make browser`` installs Debian's Chromium where that can be done; ``SDOPT_CHROMIUM`` names one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FIND = Path(__file__).parent.parent / ".ci" / "find-chromium"


def chromium() -> str:
    """The path of a Chromium; without one the test is skipped, and ``.ci/run`` installs it."""
    found = subprocess.run([FIND], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"needs a browser: {found.stderr.splitlines()[0]} (make browser)")
    return found.stdout.strip()


class Opened:
    """A page in the browser, with all that it complained of and all that it asked servers for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda one: self.requests.append(one.url))

    def _heard(self, message: object) -> None:
        kind, text = getattr(message, "type", ""), getattr(message, "text", "")
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def charts(self) -> int:
        """How many charts are drawn, once all of them are."""
        wanted = self.page.locator("div.chart").count()
        if wanted:
            self.page.wait_for_function(
                "n => document.querySelectorAll('div.chart[data-drawn=yes]').length === n",
                arg=wanted,
                timeout=60_000,
            )
        return wanted


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser for several pages; there may be only one at a time."""
    path = chromium()
    with sync_playwright() as playwright:
        # The tests may run as root, where Chromium's sandbox does not start.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def browsing(
    width: int = 1280, height: int = 900, browser: Browser | None = None
) -> Iterator[Opened]:
    """An empty page of that size, in a fresh browser unless one is given."""
    with ExitStack() as stack:
        found = browser or stack.enter_context(launched())
        page = found.new_page(viewport={"width": width, "height": height})
        stack.callback(page.close)
        yield Opened(page)


@contextmanager
def opened(
    file: Path, width: int = 1280, height: int = 900, browser: Browser | None = None
) -> Iterator[Opened]:
    """A file in the browser, loaded and its charts drawn."""
    with browsing(width, height, browser) as one:
        one.page.goto(file.absolute().as_uri())
        one.charts()
        yield one
