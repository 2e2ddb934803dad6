from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdopt.drawing import charts
from sdopt.drawing.charts import axis, bars, line, points, tree
from sdopt.drawing.page import Cell, Page
from sdopt.errors import MissingDependencyError
from tests.browser import opened

EVIL = '</script><script>document.title = "broken"</script><b>&'
ROWS = [
    {"depth": index, "error": 10.0 ** (index - 7), "where": f"down.{index}{EVIL}", "side": "a"}
    for index in range(6)
]


def error_plot() -> charts.Chart:
    return line(
        f"Error by depth {EVIL}",
        [*ROWS, {"depth": 6, "error": 0.0}, {"depth": 7, "error": float("inf")}],
        axis("depth", "depth"),
        axis("error", "relative L2", log=True),
        tooltip=["where", "error"],
        rules=[("allowed", 5e-3)],
        texts="The error grows.",
    )


def image_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_chart_is_drawn_without_a_browser() -> None:
    one = error_plot()
    pixels = image_of(one.png())
    assert pixels.shape[1] > 2 * charts.WIDTH
    assert (pixels == 255).all(-1).mean() > 0.5, "a white ground"
    other = image_of(line("", ROWS[:2], axis("depth", ""), axis("error", "")).png())
    assert pixels.shape != other.shape or (pixels != other).any()


def test_what_a_logarithmic_axis_cannot_show_is_left_out() -> None:
    values = error_plot().spec["layer"][0]["data"]["values"]
    assert [row["depth"] for row in values] == list(range(6))


def test_every_kind_of_chart_is_taken_by_vega() -> None:
    rows = [{"pass": "clean", "op": "Add", "count": 3}, {"pass": "tome", "op": "Add", "count": 1}]
    side = axis("pass", "pass", kind="nominal")
    for stacked in (True, False):
        made = bars(
            "ops",
            rows,
            axis("op", "", kind="nominal"),
            axis("count", ""),
            color=side,
            stacked=stacked,
            tooltip=["pass"],
        )
        assert made.png()
    both = points(
        "time and score",
        rows,
        axis("count", "ms"),
        axis("count", "score"),
        color=side,
        label="pass",
        tooltip=["pass", "count"],
    )
    assert both.png()


def page() -> Page:
    made = Page(f"A report {EVIL}", f"of a bundle {EVIL}")
    made.section("Numbers")
    made.table(["pass", "nodes", "share"], [[f"clean {EVIL}", 12, "40 %"], ["tome", 7, "2 %"]])
    made.heading("Notes")
    made.text("all well", tone="good")
    made.code(f"sdopt optimize {EVIL}")
    made.details("2 left", [f"reason {EVIL}", "another"])
    made.section("Pictures")
    made.chart(error_plot())
    made.images([(f"seed 0 {EVIL}", Image.new("RGB", (16, 8), "red"))])
    return made


def test_a_page_in_a_real_browser(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    page().write(file)
    with opened(file) as one:
        assert one.page.title() == f"A report {EVIL}", "text stays text"
        assert one.page.locator("h2").all_inner_texts() == ["Numbers", "Pictures"]
        one.page.click("nav a >> text=Pictures")
        assert one.page.url.endswith("#s2")
        assert one.page.locator("td.number").all_inner_texts() == ["12", "40 %", "7", "2 %"]
        assert one.charts() == 1
        assert one.page.locator("div.chart svg.marks").count() == 1
        image = one.page.locator("div.images img")
        assert image.evaluate("one => one.naturalWidth") == 16
        hover = one.page.locator("div.chart svg.marks path[aria-label*='depth: 2']").first
        hover.hover()
        one.page.wait_for_selector("#vg-tooltip-element.visible")
        assert "down.2" in one.page.locator("#vg-tooltip-element").inner_text()
        assert one.complaints == []
        assert [url for url in one.requests if not url.startswith(("file:", "data:"))] == []


def test_a_page_on_a_phone_does_not_scroll_sideways(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    page().write(file)
    with opened(file, width=390) as one:
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_without_charts_carries_no_code(tmp_path: Path) -> None:
    made = Page("plain")
    made.text("words")
    assert "<script" not in made.html()


@pytest.mark.parametrize("module", ["vl_convert", "jinja2"])
def test_without_the_extra_it_says_what_to_install(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"sdopt\[report\]"):
        page().html()


def test_a_tree_goes_right_with_first_children_and_down_with_others() -> None:
    def row(name: str, parent: str = "") -> dict[str, str]:
        return {"id": name, "parent": parent, "label": name, "below": f"of {parent}"}

    rows = [row("root"), row("a", "root"), row("b", "root"), row("c", "a"), row("other", "gone")]
    made = tree("lineage", [*rows, row("x", "y"), row("y", "x")])
    placed = {one["id"]: (one["x"], one["y"]) for one in made.spec["data"]["values"]}
    assert placed == {
        "root": (0, 0),
        "a": (1, 0),
        "c": (2, 0),
        "b": (1, 1),
        "other": (0, 2),
        "x": (0, 3),
        "y": (1, 3),
    }
    joints = made.spec["layer"][0]["data"]["values"]
    assert {"x": 0, "y": 0, "x2": 0, "y2": 1} in joints
    assert {"x": 0, "y": 1, "x2": 1, "y2": 1} in joints
    assert made.png()
    assert tree("none", []).png()


def test_what_is_folded_holds_anything(tmp_path: Path) -> None:
    made = Page("folds")
    with made.folded(f"outer {EVIL}"):
        made.table(["a"], [[Cell(f"bad {EVIL}", "bad")]])
        with made.folded("inner"):
            made.chart(error_plot())
    made.text("after")
    file = tmp_path / "folds.html"
    made.write(file)
    with opened(file) as one:
        assert not one.page.locator("td").is_visible()
        one.page.locator("summary").first.click()
        assert one.page.locator("td .bad").inner_text() == f"bad {EVIL}"
        assert not one.page.locator("svg.marks").is_visible()
        one.page.locator("summary", has_text="inner").click()
        assert one.page.locator("details details svg.marks").is_visible()
        assert one.page.locator("main > section > p").inner_text() == "after"
        assert one.complaints == []
