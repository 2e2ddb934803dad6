"""The report for people: lines, charts, and the page in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

from sdopt.bench import charts, tables, text
from sdopt.bench.report import BenchReport, Machine
from tests.bench.planted import report
from tests.browser import opened

DOCS = Path(__file__).parents[2] / "docs" / "bench.md"


def test_charts_show_the_figures() -> None:
    made = report()
    titles = [one.title for one in made.charts()]
    assert titles == [
        "unet: ms per call",
        "unet: ms, round by round",
        "images: seconds each",
        "images: where the time goes",
        "images: s, round by round",
        "host memory at its peak, MB",
        "the card's memory at its peak, MB",
    ]
    times, drift, _, parts, _, host, card = (one.spec for one in made.charts())
    assert [(one["row"], one["p50"], one["ratio"]) for one in times["data"]["values"]] == [
        ("model", 22.0, 1.0),
        ("fast", 11.5, 0.5),
    ]
    assert [
        one["time"] for one in drift["layer"][0]["data"]["values"] if one["row"] == "fast"
    ] == [10.0, 11.0, 12.0, 44.0]
    seconds = {(one["row"], one["part"]): one["seconds"] for one in parts["data"]["values"]}
    assert seconds == {
        ("model", "unet"): 2.0,
        ("model", "host"): 1.0,
        ("fast", "unet"): 1.0,
        ("fast", "host"): 0.5,
    }
    assert [one["MB"] for one in host["data"]["values"]] == [100, 100, 60, 100, 50, 10]
    assert [(one["row"], one["MB"]) for one in card["data"]["values"]] == [("fast", 512)]


def test_memory_that_was_not_measured_is_not_drawn() -> None:
    rows = (
        tables.Row("a", "a", "ort", {}, tables.Memory("x", why="no", device="no")),
        tables.Row("b", "b", "ort", {}),
    )
    assert charts.memory(rows) == []
    found = text.memory(report(rows=rows))
    assert found[1:] == [("a", "not measured", "not measured", "not measured", "no")]


def test_a_page_in_a_real_browser(tmp_path: Path) -> None:
    made = report()
    file = tmp_path / "bench.html"
    text.page(made).write(file)
    with opened(file) as one:
        assert one.page.title() == "Benchmark of toy"
        sections = ["unet", "Images", "Memory", "How it was measured"]
        assert one.page.locator("h2").all_inner_texts() == sections
        assert one.charts() == len(made.charts()) == 7
        assert one.page.locator("div.chart svg.marks").count() == 7
        table = one.page.locator("#s1 table tbody tr").all_inner_texts()
        assert [line.split("\t")[:3] for line in table] == [
            ["model", "22", "23.7"],
            ["fast", "11.5", "39.2"],
        ]
        assert "0.500 (0.500 to 0.875)" in table[1]
        one.page.locator("#s1 svg path[aria-label*='p95: 39.2']").first.hover()
        one.page.wait_for_selector("#vg-tooltip-element.visible")
        assert "11.5" in one.page.locator("#vg-tooltip-element").inner_text()
        assert "noisy: unet of fast" in one.page.locator("p.bad").inner_text()
        assert one.page.locator("#s4 pre").inner_text().strip() == "sdopt bench b"
        assert one.complaints == []
        assert [url for url in one.requests if not url.startswith(("file:", "data:"))] == []


def test_the_page_on_a_phone_does_not_scroll_sideways(tmp_path: Path) -> None:
    file = tmp_path / "bench.html"
    text.page(report()).write(file)
    with opened(file, width=390) as one:
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_of_components_alone(tmp_path: Path) -> None:
    rows = tuple(tables.Row(one.label, one.stage, one.target, {}) for one in report().rows)
    html = text.page(report(images=None, rows=rows, command="", notes=())).html()
    titles = re.findall("<h2>(.*?)</h2>", html.split("<script>")[0])
    assert titles == ["unet", "How it was measured"]


def test_every_key_of_the_json_is_documented() -> None:
    page = DOCS.read_text("utf-8")
    data = report().to_json()
    images, component = data["images"], data["components"][0]
    kinds = {
        "The report": (BenchReport, data),
        "`rows`": (tables.Row, data["rows"][0]),
        "`memory`": (tables.Memory, data["rows"][0]["memory"]),
        "`machine`": (Machine, data["machine"]),
        "A component": (tables.ComponentBench, component),
        "`images`": (tables.ImageBench, images),
        "A row of times": (tables.Measured, images["rows"][0]),
        "`spread`": (None, component["rows"][0]["spread"]),
        "`ratio`": (None, component["rows"][0]["ratio"]),
    }
    for title, (_, entry) in kinds.items():
        section = page.split(f"### {title}\n", 1)[1].split("\n### ", 1)[0]
        keys = re.findall(r"^\| `(\w+)`", section, re.M)
        assert keys == list(entry), title
