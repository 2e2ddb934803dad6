from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser

from sdopt.sweep import charts
from sdopt.sweep.effects import effects
from sdopt.sweep.page import page, plot
from tests.browser import launched, opened
from tests.sweep.results import EVIL, point, result


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    page(result(folder)).write(folder / "sweep.html")
    return folder / "sweep.html"


def test_hovering_a_point_shows_its_recipe_and_its_images(file: Path, browser: Browser) -> None:
    with opened(file, browser=browser) as one:
        points = one.page.locator("div.chart").first.locator("path[aria-roledescription=point]")
        assert points.count() == 2 * 7, "seven points were measured, two panels"
        one.page.locator("div.chart").first.locator("path[aria-label*='tome=1;']").first.hover()
        shown = one.page.locator("#vg-tooltip-element.visible")
        shown.wait_for()
        assert "@fast,tome=1" in shown.inner_text()
        assert "0.9400 ± 0.0040" in shown.inner_text()
        image = shown.locator("img")
        image.evaluate("one => one.decode()")
        assert image.evaluate("one => [one.naturalWidth, one.naturalHeight]") == [192, 48]
        assert one.complaints == []
        assert [url for url in one.requests if not url.startswith(("file:", "data:"))] == []


def test_a_button_copies_the_command_of_its_point(file: Path, browser: Browser) -> None:
    with opened(file, browser=browser) as one:
        rows = one.page.locator("table", has_text="What measures a point again").locator(
            "tbody tr"
        )
        assert rows.count() == 8
        row = rows.nth(3)
        row.locator("button").click()
        assert row.locator("button").inner_text() == "copied"
        one.page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<textarea id=paste></textarea>')"
        )
        one.page.locator("#paste").focus()
        one.page.keyboard.press("Control+V")
        pasted = one.page.locator("#paste").input_value()
        assert pasted == "sdopt sweep bundle --passes '@fast,tome=1' # 3"


def test_the_page_says_all_that_a_reader_needs(file: Path, browser: Browser) -> None:
    with opened(file, browser=browser) as one:
        sections = one.page.locator("h2").all_inner_texts()
        assert sections == [
            "Frontier",
            "What each choice changes",
            "Points",
            "Commands",
            "Where it was measured",
        ]
        text = one.page.locator("main").inner_text()
        assert f"cannot be lowered {EVIL}" in text
        assert "worse than k1" in text
        assert "A Processor" in text
        assert "1 to 8" in text, "all points were measured on one machine"
        assert "A note." in text


def test_what_a_choice_is_worth_is_told_apart_from_the_others() -> None:
    grid = [point(tome, half, 2 * tome + half) for tome in range(3) for half in (False, True)]
    found = {(one.option, one.value): one for one in effects(grid)}
    assert {one.option for one in found.values()} == {"tome", "cast_fp16"}, "what was varied"
    two = found["tome", "tome=2"].effects
    assert two["ms"].value == pytest.approx(0.81)
    assert two["score"].value == pytest.approx(-0.02)
    assert two["memory_bytes"].value == pytest.approx(1.0)
    assert two["ms"].error == pytest.approx(0.0, abs=1e-9), "the grid has no noise"
    assert found["cast_fp16", "cast_fp16"].effects["ms"].value == pytest.approx(2.0)
    assert found["tome", ""].effects == {}, "the first choice is what the others are held against"
    # Without half the grid it is no other: a mean over points alone would be confounded.
    some = [grid[0], grid[3], grid[4], grid[5]]
    two = {(one.option, one.value): one for one in effects(some)}["tome", "tome=2"].effects
    assert two["ms"].value == pytest.approx(0.81)


def test_the_error_of_an_effect_is_that_of_a_difference_of_means() -> None:
    scores = [0.1, 0.3, 0.5, 0.9]
    made = [point(i // 2, False, i, score=score) for i, score in enumerate(scores)]
    one = {(one.option, one.value): one for one in effects(made)}["tome", "tome=1"]
    assert one.effects["score"].value == pytest.approx(0.5)
    pooled = (0.02 + 0.08) / 2
    assert one.effects["score"].error == pytest.approx(math.sqrt(pooled * (1 / 2 + 1 / 2)))


def test_what_points_cannot_tell_apart_has_no_effect() -> None:
    both = [point(0, False, 0), point(1, True, 1), point(0, False, 2), point(1, True, 3)]
    assert all(one.effects == {} for one in effects(both))
    assert charts.effects(effects(both)) is None
    assert effects([]) == []


def test_the_frontier_is_drawn_for_a_readme_and_without_a_score() -> None:
    points = [point(tome, False, tome, frontier=True) for tome in range(3)]
    numbers = charts.numbered(points)
    chart = charts.frontier(points, numbers, below="A Processor, 2026-11-25")
    assert chart is not None
    assert chart.png()
    assert [panel["layer"][0]["data"]["values"] for panel in chart.spec["hconcat"]] == [
        [{"ms": 81.0, "score": 0.93}, {"ms": 90.0, "score": 0.94}, {"ms": 100.0, "score": 0.95}],
        [{"MB": 200.0, "score": 0.95}],
    ]
    without = [dataclasses.replace(one, score=None) for one in points]
    chart = charts.frontier(without, numbers)
    assert chart is not None
    assert [panel["layer"][0]["data"]["values"] for panel in chart.spec["hconcat"]] == [
        [{"ms": 81.0, "MB": 200.0}]
    ]
    nothing = [dataclasses.replace(one, ms=None, memory_bytes=None) for one in points]
    assert charts.frontier(nothing, numbers) is None


def test_the_plot_of_each_size_is_a_file(tmp_path: Path) -> None:
    made = result(tmp_path)
    assert plot(made, tmp_path / "one.png") == [tmp_path / "one.png"]
    first = charts.frontier(made.points, charts.numbered(made.points), "x", below="y")
    assert first is not None
    assert first.spec["title"]["subtitle"] == "y"
    with Image.open(tmp_path / "one.png") as image:
        assert image.width > 2 * 2 * 420, "two panels, two pixels of the file for each"
    other = dataclasses.replace(made.points[0], key="other", shape="64x64")
    both = dataclasses.replace(made, points=(*made.points, other))
    assert plot(both, tmp_path / "two.png") == [
        tmp_path / "two-128x128.png",
        tmp_path / "two-64x64.png",
    ]


def test_presets_are_called_by_their_names() -> None:
    def name(recipe: str) -> str:
        return dataclasses.replace(point(0, False, 0), recipe=recipe).name

    fast = "clean,raise_ops,clean,fuse_qkv,pad_align"
    assert name(fast) == "@fast"
    assert name(f"{fast},tome=3") == "@fast,tome=3"
    assert name(f"{fast},cast_fp16,tome=3") == "@fast_fp16,tome=3"
    assert name(f"{fast},cast_fp16:keep=io") == "@fast,cast_fp16:keep=io"
    assert name("clean") == "clean"
    assert name("") == "raw"


def test_a_sweep_of_nothing_measured_still_has_a_page(tmp_path: Path) -> None:
    made = result(tmp_path)
    failed = dataclasses.replace(made, points=made.points[-1:], axes=())
    assert "No point of this size was measured." in page(failed).html()
